"""The settings of the engine, and their translation into DeepSpeed's JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from cdssl_dist.train.setup import SetupError

RESERVED_KEYS: Final = {  # DeepSpeed keys that the typed configuration replaces
    "optimizer": "the section optim",
    "scheduler": "the section schedule",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "train_batch_size": "data.packs_per_step",
    "torch_autocast": "engine.precision",
}


@dataclass(frozen=True)
class EngineSettings:
    """The settings that determine how a step is computed."""

    stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]
    micro_steps: int
    clip: float  # maximum gradient norm, 0 for no clipping
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    ema: float = 0.0  # decay of the running mean of the weights, 0 for none
    extra: dict[str, Any] = field(default_factory=dict)  # the raw deepspeed section


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """Build the configuration that DeepSpeed expects.

    Raises:
        SetupError: if the raw section contradicts the typed config, or sets what only the typed config may set.
    """
    bf16 = settings.precision == "bf16" and settings.stage > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.micro_steps,
        "gradient_clipping": settings.clip if settings.stage > 0 else 0.0,  # see Engine._norm
        "zero_optimization": {"stage": settings.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if bf16:
        # Sums over micro-steps and ranks in f32; ZeRO-2 and 3 still round the sum over ranks of one micro-step.
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    for key, value in settings.extra.items():
        if key in RESERVED_KEYS:
            raise SetupError(
                f"engine.deepspeed.{key} does nothing here, or does harm: set {RESERVED_KEYS[key]} instead"
            )
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            clash = [k for k in value if k in config[key] and config[key][k] != value[k]]
            config[key] = value | config[key]
        else:
            clash = [key] if key in config and config[key] != value else []
            config.setdefault(key, value)
        if clash:
            raise SetupError(
                f"engine.deepspeed.{key} contradicts the typed configuration ({', '.join(clash)}): "
                "set it in the typed configuration only"
            )
    return config
