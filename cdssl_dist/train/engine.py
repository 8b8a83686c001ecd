"""The engine, and the only module that knows DeepSpeed.

At every ZeRO stage and precision, DeepSpeed reduces the gradients, computes their global norm, clips, and then calls
``step`` of the optimizer that it was given. That call is the gate: our optimizer asks what to do with the norm, and
leaves the weights and its own state untouched when told to skip. If DeepSpeed itself finds a non-finite norm, it does
not call the optimizer at all, and the engine asks afterwards. Either way, it is asked once per step, on all ranks.

The optimizer's state for each weight (Adam's moments and, kept like a third moment, the running mean of the weights)
is sharded as DeepSpeed shards the weights. So the mean needs no special handling at any stage, a skipped step does not
change it, and checkpoints store it like the moments.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Must be set before DeepSpeed is imported, which would otherwise find it out by compiling or guessing.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")

import deepspeed  # noqa: E402
from deepspeed.accelerator import get_accelerator, set_accelerator  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.ops import __compatible_ops__  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from cdssl_dist.model.precision import bf16_twin, round_into  # noqa: E402
from cdssl_dist.train.deepspeed_json import EngineSettings, deepspeed_config  # noqa: E402
from cdssl_dist.train.gate import EMA, GatedAdamW  # noqa: E402

MOMENTS: Final = ("exp_avg", "exp_avg_sq")  # Adam's, for each parameter

# norm of the step → learning rate to apply it with, or None to skip it; a collective, called on all ranks
Decide = Callable[[float], float | None]


def init_distributed(device: torch.device) -> None:
    """Join the process group that the launcher described in the environment."""
    # Otherwise DeepSpeed compiles its shared-memory all-reduce at first use, which takes 95 s and needs a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu" and get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())  # a CPU run on a machine with GPUs
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL sends Python objects from the current device
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class Engine:
    """One model under DeepSpeed.

    Args:
        model: the model, on any device, in f32.
        settings: how steps are computed.
        device: of this rank.
        decide: called once per step with the global gradient norm.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings, device: torch.device, decide: Decide) -> None:
        self.settings, self.device, self._decide = settings, device, decide
        self._answer: list[float | None] = []
        self._block_norms: dict[str, float] = {}
        self._optimizer = GatedAdamW(
            model.parameters(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        self._optimizer.ema = settings.ema
        model = model.to(device)
        # DeepSpeed's own bf16 at stage 0 would accumulate in bf16.
        self._twin = bf16_twin(model) if settings.stage == 0 and settings.precision == "bf16" else None
        self.ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(settings),
            dist_init_required=False,
        )
        self._make_moments()
        self._optimizer.gate = self._ask  # only now: DeepSpeed may have stepped once to create its state

    @property
    def module(self) -> nn.Module:
        """The model, to be called: under ZeRO-3 its weights are gathered as it runs."""
        return self.ds

    @property
    def computing(self) -> nn.Module:
        """The module that actually computes, for hooks: the model, or its bf16 twin."""
        return self.ds.module if self._twin is None else self._twin

    def backward(self, loss: Tensor) -> None:
        """Accumulate one micro-step and, after the last of a step, decide and update.

        DeepSpeed divides by the number of micro-steps and averages over ranks; the loss must be scaled for both.
        """
        boundary = self.ds.is_gradient_accumulation_boundary()
        self._answer.clear()
        self.ds.backward(loss)
        if boundary and self._optimizer.changes is not None:
            self._block_norms = self._norms_by_block()
        self.ds.step()
        if boundary and not self._answer:
            self._decide(float("inf"))
        if boundary and self._twin is not None:
            round_into(self._twin, self.ds.module)

    def _ask(self) -> float | None:
        """Answer the optimizer, which asks for each parameter (sub-)group; decide once per step."""
        if not self._answer:
            self._answer.append(self._decide(self._norm()))
        return self._answer[0]

    def _norm(self) -> float:
        wrapper = self.ds.optimizer
        if wrapper is not self._optimizer:
            return float(wrapper._global_grad_norm)
        # At stage 0 DeepSpeed does not expose the norm before the update, so compute it, and clip, here.
        grads = [p.grad for p in self.ds.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.ds.module.parameters(), self.settings.clip, norm)
        return float(norm)

    # -- occasional measurements --------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Measure the next step in detail; see ``watched``."""
        self._optimizer.changes = torch.zeros(2, dtype=torch.float32, device=self.device)
        self._block_norms = {}

    def watched(self) -> dict[str, float]:
        """Gradient norms by block and ‖Δw‖ / ‖w‖ of the watched step (0 where it was skipped); a collective."""
        sums = self._optimizer.changes
        assert sums is not None, "nothing was watched"
        self._optimizer.changes = None
        if self.settings.stage > 0:  # each rank updated its share
            torch.distributed.all_reduce(sums)
        change, size = (float(v) ** 0.5 for v in sums)
        return {"watch/update_ratio": change / size if size else 0.0, **self._block_norms}

    def _norms_by_block(self) -> dict[str, float]:
        """Gradient norm of each block, of the input layers and of the head; a collective, before the update."""
        squares: dict[str, Tensor] = {}
        for name, p in self.ds.module.named_parameters():
            gradient = p.grad if self.settings.stage == 0 else safe_get_full_grad(p)
            if gradient is not None:
                key = _block_of(name)
                squares[key] = squares.get(key, torch.zeros((), device=self.device)) + gradient.float().square().sum()
        return {f"watch/grad_norm/{key}": float(value) ** 0.5 for key, value in squares.items()}

    # -- state: full tensors by name, whatever the stage and the number of ranks --------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``weight/…``, ``exp_avg/…``, ``exp_avg_sq/…`` and, if kept, ``ema/…`` of every parameter, f32.

        Each is a collective.
        """
        for name, p, master in self._parameters():
            yield f"weight/{name}", self._full(p, master)
            for kept in self._kept:
                yield f"{kept}/{name}", self._full(p, master, kept)

    def weights(self) -> dict[str, Tensor]:
        """Full f32 weights by name, on CPU, or their running mean if one is kept; a collective."""
        what = EMA if self.settings.ema else None
        return {name: self._full(p, master, what).cpu().clone() for name, p, master in self._parameters()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, compute with the running mean of the weights, if one is kept; a collective."""
        if not self.settings.ema:
            yield
            return
        saved = []
        for _, p, master in self._parameters():
            mean = self._full(p, master, EMA)
            with self._whole(p), torch.no_grad():
                saved.append(p.detach().clone())
                p.copy_(mean)
        yield
        for (_, p, _), value in zip(self._parameters(), saved, strict=True):
            with self._whole(p), torch.no_grad():
                p.copy_(value)

    def set_tensors(self, read: Callable[[str], Tensor], applied: int) -> None:
        """Load what ``tensors`` yielded, at any stage and number of ranks; a collective.

        Args:
            read: name → full tensor, on CPU.
            applied: number of updates made, which becomes Adam's step count.
        """
        for name, p, master in self._parameters():
            weight = read(f"weight/{name}").to(self.device)
            kept = {what: read(f"{what}/{name}").to(self.device) for what in self._kept}
            with torch.no_grad():
                if master is not None:
                    master.copy_(weight)
                    for what, value in kept.items():
                        self._optimizer.state[master][what].copy_(value)
                else:
                    self._set(p, weight)
                    for what, value in kept.items():
                        self._set(p, value, what)
                # The model computes with its own copy of the f32 weights that the optimizer updates.
                with self._whole(p):
                    p.copy_(weight)
        for state in self._optimizer.state.values():
            state["step"].fill_(applied)

    @property
    def _kept(self) -> tuple[str, ...]:
        return (*MOMENTS, EMA) if self.settings.ema else MOMENTS

    def _full(self, p: nn.Parameter, master: Tensor | None, what: str | None = None) -> Tensor:
        """Return one full tensor, f32: the weight of a parameter, or its optimizer state ``what``; a collective."""
        if master is not None:
            return (master.detach() if what is None else self._optimizer.state[master][what]).float()
        return safe_get_full_fp32_param(p) if what is None else safe_get_full_optimizer_state(p, what)

    def _set(self, p: nn.Parameter, value: Tensor, what: str | None = None) -> None:
        """Set this rank's part of the f32 weight, or of the optimizer state ``what``, from a full tensor."""
        if self.settings.stage < 3:
            if what is None:
                safe_set_full_fp32_param(p, value)
            else:
                safe_set_full_optimizer_state(p, value, what)
            return
        # DeepSpeed's own function fails at stage 3 if a tensor is not divisible by the ranks: its last part is padded.
        part = p.ds_tensor.numel()  # type: ignore[attr-defined]
        missing = part * dist.get_world_size() - value.numel()
        mine = nn.functional.pad(value.flatten(), (0, missing)).narrow(0, part * dist.get_rank(), part)
        if what is None:
            safe_set_local_fp32_param(p, mine)
        else:
            safe_set_local_optimizer_state(p, mine, what)

    def _whole(self, p: nn.Parameter) -> Any:
        """Return a context in which the full parameter is present and can be changed."""
        return deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self.settings.stage == 3)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """Yield name, parameter and, at stage 0, the (unsharded) f32 tensor that the optimizer updates."""
        masters = list(self.ds.module.parameters()) if self.settings.stage == 0 else None
        for i, (name, p) in enumerate(self.computing.named_parameters()):
            yield name, p, masters[i] if masters else None

    def _make_moments(self) -> None:
        """Create Adam's initial state, at every stage.

        DeepSpeed would create it at the first update, so that a checkpoint could not be loaded into a new engine, and
        skipping the first step would leave it half initialized.
        """
        wrapper = self.ds.optimizer
        masters = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # stage 3, which lends them to the optimizer
        for p in masters or [p for group in self._optimizer.param_groups for p in group["params"]]:
            state = self._optimizer.state[p]
            fused = self._optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(p)
            if self.settings.ema:
                state[EMA] = p.detach().clone()
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._lazy_init_hp_params_optimizer_state()


def _block_of(name: str) -> str:
    """``encoder.blocks.1.edge.…`` → ``block1``; what is not in a block is ``input`` or ``head``."""
    parts = name.split(".")
    if "blocks" in parts:
        return f"block{parts[parts.index('blocks') + 1]}"
    return "input" if parts[0] == "encoder" else "head"
