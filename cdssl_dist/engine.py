"""DeepSpeed, and the only file that knows it.

DeepSpeed reduces the gradients, takes their global norm, clips, and then calls ``step`` of the optimizer that it was
given, at every ZeRO stage and precision. That call is the gate: ours asks what to do with the norm, and leaves the
weights and its own state untouched when told to skip. Where DeepSpeed finds a non-finite norm by itself, it does not
call the optimizer at all; the question is then asked afterwards. Either way it is asked once a step, on all ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

# What DeepSpeed is told that it would otherwise find out by compiling or guessing; before its import.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")

import deepspeed  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

MOMENTS: Final = ("exp_avg", "exp_avg_sq")  # Adam's, for each parameter

# norm of the step → learning rate to apply it with, or None to skip it; a collective, called on all ranks
Decide = Callable[[float], float | None]


@dataclass(frozen=True)
class EngineSettings:
    """What decides how a step is computed."""

    stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]
    micro_steps: int
    clip: float  # largest norm, 0 for none
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)  # the raw deepspeed section


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates."""

    gate: Callable[[], float | None] | None = None

    def step(self, closure: Any = None) -> Any:
        """Update, with the learning rate that the gate gives; nothing changes when it gives None."""
        if self.gate is not None:
            lr = self.gate()
            if lr is None:
                return None
            for group in self.param_groups:
                group["lr"] = lr
        return super().step(closure)


def init_distributed(device: torch.device) -> None:
    """Join the process group that the launcher described in the environment."""
    # DeepSpeed would compile its shared-memory all-reduce at first use: 95 s, and a compiler needed.
    __compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class Engine:
    """One model under DeepSpeed.

    Args:
        model: on any device, in f32.
        settings: how.
        device: of this rank.
        decide: asked once a step with the global gradient norm.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings, device: torch.device, decide: Decide) -> None:
        self.settings, self.device, self._decide = settings, device, decide
        self._answer: list[float | None] = []
        self._optimizer = GatedAdamW(
            model.parameters(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        self.ds, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=self._optimizer,
            config=deepspeed_config(settings),
            dist_init_required=False,
        )
        self._make_moments()
        self._optimizer.gate = self._ask  # from here on: DeepSpeed may have stepped once to make its state

    @property
    def module(self) -> nn.Module:
        """The model, to be called: under ZeRO-3 its weights are gathered as it runs."""
        return self.ds

    def backward(self, loss: Tensor) -> None:
        """Accumulate one micro-step and, after the last of a step, decide and update.

        DeepSpeed divides by the number of micro-steps and averages over ranks; the loss must be scaled for both.
        """
        boundary = self.ds.is_gradient_accumulation_boundary()
        self._answer.clear()
        self.ds.backward(loss)
        self.ds.step()
        if boundary and not self._answer:
            self._decide(float("inf"))

    def _ask(self) -> float | None:
        """Asked by each parameter group or sub-group of a step; decided once."""
        if not self._answer:
            self._answer.append(self._decide(self._norm()))
        return self._answer[0]

    def _norm(self) -> float:
        wrapper = self.ds.optimizer
        if wrapper is not self._optimizer:
            return float(wrapper._global_grad_norm)
        # ZeRO 0 in f32 has neither norm nor clipping of its own that could be seen before it acts
        grads = [p.grad for p in self.ds.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.ds.module.parameters(), self.settings.clip, norm)
        return float(norm)

    # -- state: full tensors by name, whatever the stage and the number of ranks --------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``weight/…``, ``exp_avg/…`` and ``exp_avg_sq/…`` of every parameter, f32; a collective, one at a time."""
        for name, p, master in self._parameters():
            if master is not None:
                yield f"weight/{name}", master.detach().float()
                for moment in MOMENTS:
                    yield f"{moment}/{name}", self._optimizer.state[master][moment].float()
            else:
                yield f"weight/{name}", safe_get_full_fp32_param(p)
                for moment in MOMENTS:
                    yield f"{moment}/{name}", safe_get_full_optimizer_state(p, moment)

    def weights(self) -> dict[str, Tensor]:
        """Full f32 weights by name, on CPU; a collective."""
        found = ((name.removeprefix("weight/"), t) for name, t in self.tensors() if name.startswith("weight/"))
        return {name: tensor.cpu().clone() for name, tensor in found}

    def set_tensors(self, read: Callable[[str], Tensor], applied: int) -> None:
        """Take over what ``tensors`` gave, at any stage and number of ranks; a collective.

        Args:
            read: name → full tensor, on CPU.
            applied: updates made, which Adam counts for itself.
        """
        for name, p, master in self._parameters():
            weight = read(f"weight/{name}").to(self.device)
            moments = {moment: read(f"{moment}/{name}").to(self.device) for moment in MOMENTS}
            with torch.no_grad():
                if master is not None:
                    master.copy_(weight)
                    for moment, value in moments.items():
                        self._optimizer.state[master][moment].copy_(value)
                else:
                    safe_set_full_fp32_param(p, weight)
                    for moment, value in moments.items():
                        safe_set_full_optimizer_state(p, value, moment)
                # The weights that the model computes with stand beside the f32 ones that the optimizer updates.
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self.settings.stage == 3):
                    p.copy_(weight)
        for state in self._optimizer.state.values():
            state["step"].fill_(applied)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """Name, parameter, and at stage 0 the f32 tensor that the optimizer updates, which is whole there."""
        named = list(self.ds.module.named_parameters())
        whole = self._optimizer.param_groups[0]["params"] if self.settings.stage == 0 else [None] * len(named)
        for (name, p), master in zip(named, whole, strict=True):
            yield name, p, master

    def _make_moments(self) -> None:
        """Adam's state as before its first step, at every stage.

        DeepSpeed makes it at the first update: then a checkpoint could not be read into a new engine, and a first step
        that is skipped would leave it half made. At stage 0 in bf16 it makes it by a step that counts.
        """
        wrapper = self.ds.optimizer
        masters = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # ZeRO-3, which lends them for each step
        for p in masters or [p for group in self._optimizer.param_groups for p in group["params"]]:
            state = self._optimizer.state[p]
            fused = self._optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(p)
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._lazy_init_hp_params_optimizer_state()


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The JSON that DeepSpeed wants.

    Raises:
        ValueError: where the raw section contradicts what the typed config says.
    """
    own_clip = settings.stage == 0 and settings.precision == "fp32"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.micro_steps,
        "gradient_clipping": 0.0 if own_clip else settings.clip,
        "zero_optimization": {"stage": settings.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    for key, value in settings.extra.items():
        if key in ("zero_optimization", "bf16") and isinstance(value, dict):
            clash = [k for k in value if k in config[key] and config[key][k] != value[k]]
            config[key] = value | config[key]
        else:
            clash = [key] if key in config and config[key] != value else []
            config.setdefault(key, value)
        if clash:
            raise ValueError(
                f"engine.deepspeed.{key} contradicts the typed configuration ({', '.join(clash)}): "
                "say it in one place, the typed one"
            )
    return config
