"""DeepSpeed, and the only file that knows it.

DeepSpeed reduces the gradients, takes their global norm, clips, and then calls ``step`` of the optimizer that it was
given, at every ZeRO stage and precision. That call is the gate: ours asks what to do with the norm, and leaves the
weights and its own state untouched when told to skip. Where DeepSpeed finds a non-finite norm by itself, it does not
call the optimizer at all; the question is then asked afterwards. Either way it is asked once a step, on all ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What DeepSpeed is told that it would otherwise find out by compiling or guessing; before its import.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")

import deepspeed  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

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
        self._optimizer.gate = self._ask  # from here on: DeepSpeed may step once to make its state

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

    def weights(self) -> dict[str, Tensor]:
        """Full f32 weights by name, on CPU; a collective."""
        partitioned = self.settings.stage > 0
        full = {}
        for name, p in self.ds.module.named_parameters():
            value = safe_get_full_fp32_param(p) if partitioned else None
            full[name] = (p.detach() if value is None else value).detach().float().cpu().clone()
        return full

    def save(self, folder: Path) -> None:
        """Write the state of all ranks below ``folder``; a collective."""
        self.ds.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote at the same number of ranks; a collective."""
        path, _ = self.ds.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state there")


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
