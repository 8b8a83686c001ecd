"""The typed configuration of a run. Unknown keys and wrong types are errors that name the key.

A run is configured by a YAML file and ``section.key=value`` overrides; anything omitted takes the default below.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.resources
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=Section)


class DataConfig(Section):
    """The training data, and how they are divided into steps."""

    path: str | None = None  # folder of a data set; CDSSL_DATA if omitted
    packs_per_step: int = Field(8, ge=1)  # P: the global batch, at any number of ranks
    share: float = Field(1.0, gt=0, le=1)  # fraction of the training blocks used, for scaling curves
    blocks_per_pack: int = Field(1, ge=1)  # k: the micro-batch of one rank
    prefetch: int = Field(4, ge=1)  # packs read ahead
    cache_gb: float = Field(50.0, ge=0)  # 10⁹ bytes: cache of remote shards on a node; 0 disables it
    bad_blocks: Literal["error", "skip"] = "error"  # for a block that fails its checksum
    val_packs: int | None = Field(None, ge=1)  # per validation, rounded up to whole steps; all if omitted


class GraphConfig(Section):
    """The Gaussian expansion of distances; the cutoff is that of the data set."""

    centers: int = Field(100, ge=2)
    gamma: float = Field(0.5, gt=0)  # Å
    margin: float = Field(1.0, ge=0)  # Å; centres lie on [0, cutoff + margin]


class NoiseConfig(Section):
    """The displacement of atoms."""

    sigma: float | tuple[float, float] = 0.3  # Å; a pair means log-uniform per graph
    seed: int = 0

    @model_validator(mode="after")
    def _positive(self) -> NoiseConfig:
        low, high = self.range
        if not 0 < low <= high < math.inf:
            raise ValueError("sigma must be positive and finite, and a pair in ascending order")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest σ, Å."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)


class PretextConfig(Section):
    """Options beyond the paper; see ``model/beyond.py``, and docs/results.md for what each is worth."""

    strain: float = Field(0.0, ge=0, lt=0.3)  # of the cell, denoised as well; more could invert cells
    sigma_in_state: bool = False
    conditioned: bool = False  # give the state the encoder's output for the true crystal
    displacement: float = Field(0.0, ge=0)  # weight of a node-level loss on the displacements
    masked: float = Field(0.0, ge=0, lt=1)  # fraction of the atoms whose element is masked

    @property
    def options(self) -> dict[str, Any]:
        """The options that are switched on; empty for the paper's task."""
        return self.model_dump(exclude_defaults=True)


class ModelConfig(Section):
    """MEGNet."""

    width: int = Field(32, ge=1)  # of node, edge and state vectors
    hidden: int = Field(64, ge=1)  # of the layers inside an update
    blocks: int = Field(3, ge=1)
    seed: int = 0  # of the initial weights

    @property
    def sizes(self) -> dict[str, int]:
        """Constructor arguments of the network."""
        return self.model_dump(exclude={"seed"})


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW."""

    lr: float = Field(2e-3, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0)  # maximum gradient norm; 0 disables clipping
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the mean weights, which are validated and exported; 0: none


class ScheduleConfig(Section):
    """The learning rate, as a function of applied steps."""

    steps: int = Field(10_000, ge=1)  # consumed steps: the length of the run
    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: int = Field(100, ge=0)
    decay: float = Field(0.2, gt=0, le=1)  # fraction of the run over which wsd decays
    final: float = Field(0.01, ge=0, le=1)  # final rate, as a fraction of lr


class EngineConfig(Section):
    """DeepSpeed."""

    stage: Literal[0, 1, 2, 3] = 1  # ZeRO
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recompute: bool = False  # each block, in the backward pass: less memory, a third more work
    compile: bool = False  # faster in f32 on CPU, but starts in minutes: docs/performance.md
    kernels: Literal["torch", "triton"] = "torch"  # of the edge path; triton needs a GPU and always recomputes
    threads: int = Field(1, ge=1)  # per worker, on CPU
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # passed through; contradictions are errors

    @model_validator(mode="after")
    def _goes_together(self) -> EngineConfig:
        if self.compile and self.kernels != "torch":
            raise ValueError("compile and kernels=triton both replace the edge path: choose one")
        if self.kernels == "triton" and self.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("kernels=triton cannot run with device=cpu: the kernels are for GPUs")
        if (self.compile or self.kernels != "torch") and self.stage == 3:
            name = "compile" if self.compile else "kernels"
            raise ValueError(
                f"{name} does not go with stage=3: fused code keeps references to weights that ZeRO-3 partitions "
                f"between layers; use stage 0, 1 or 2, or leave {name} out"
            )
        if self.compile and self.stage == 0 and self.precision == "bf16":
            raise ValueError(
                "compile has no effect on the bf16 copy that stage 0 computes with; set stage=1, with equal results"
            )
        return self


class GuardConfig(Section):
    """How the gradient guard judges steps; see ``guard.py``."""

    on_spike: Literal["clip", "skip", "apply"] = "skip"  # clip: apply, cut to optim.clip; apply: no spike is bad
    warmup: int = Field(50, ge=2)  # finite norms seen before one can be a spike
    memory: float = Field(0.99, gt=0, lt=1)  # decay of the running statistics
    z_spike: float = Field(6.0, gt=0)  # in running standard deviations of the log norm, above its running mean
    min_deviation: float = Field(0.1, gt=0)  # of the log norm: a floor, so that quiet runs are not full of spikes
    rollback_after: int = Field(5, ge=2)  # bad steps in a row
    max_rollbacks: int = Field(3, ge=0)
    rollback_lr: float = Field(0.5, gt=0, le=1)  # factor on the learning rate
    max_bad_share: float = Field(0.1, gt=0, le=1)  # of the last 1000 steps; more stops the run
    level_after: int = Field(10, ge=2)  # so many agreeing spikes in a row, with an unchanged loss, are a new level
    level_spread: float = Field(1.0, gt=0)  # largest spread of their log norms
    level_loss: float = Field(1.5, ge=1)  # largest loss of each, relative to the running mean


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: int = Field(500, ge=1)  # steps
    keep: int = Field(2, ge=1)
    quiet: int = Field(50, ge=0)  # steps after which a checkpoint counts as good
    best: bool = True  # the one with the lowest val/loss is kept too
    hours: float | None = Field(None, gt=0)  # keep one checkpoint per span of this length permanently
    mirror: str | None = None  # URL or folder to copy checkpoints to, and to restore from if none is left locally
    mirror_wait: float = Field(60.0, ge=0)  # s; how long the end of a run waits for the last copy
    allow_changed: tuple[str, ...] = ()  # keys whose values may change during a run; ``data`` for the data set


class ClusterConfig(Section):
    """Ray Train."""

    address: str | None = None  # of a running cluster; else one is started in this process
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1  # a pair [min, max]: as many as the cluster has room for
    resize_every: float = Field(60.0, gt=0)  # s between checks for room for more workers
    gpus_per_worker: float = Field(0.0, ge=0)
    cpus_per_worker: float = Field(1.0, gt=0)
    max_failures: int = Field(3, ge=-1)  # restarts of the worker group; −1 means any number
    hang_after: float = Field(1800.0, gt=0)  # s without a step; must exceed a validation or a checkpoint
    stop_within: float = Field(120.0, gt=0)  # s from a stop request until the driver exits, saved or not

    @model_validator(mode="after")
    def _ascending(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError("workers must be a number, or a pair [min, max] in ascending order")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run continues with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrackingConfig(Section):
    """MLflow, metrics and validation."""

    uri: str | None = None  # if omitted, MLFLOW_TRACKING_URI, else a SQLite file beside the run
    experiment: str = "cdssl-pretrain"
    every: int = Field(20, ge=1)  # steps between lines of metrics
    validate_every: int = Field(500, ge=1)  # steps; a validation always ends the run
    watch_every: int = Field(200, ge=0)  # steps between closer looks at gradients, updates and edges; 0: never
    baseline_packs: int = Field(32, ge=1)  # training packs that skill_edge's baseline is fitted on


class RegistryConfig(Section):
    """Registration of the finished encoder."""

    name: str | None = "cdssl-encoder"  # null: not registered


class Config(Section):
    """One pretraining run."""

    run: str = "runs/pretrain"  # the run folder
    data: DataConfig = DataConfig()
    graph: GraphConfig = GraphConfig()
    noise: NoiseConfig = NoiseConfig()
    pretext: PretextConfig = PretextConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.cluster.max_workers > self.data.packs_per_step:
            raise ValueError(
                f"cluster.workers={self.cluster.max_workers} exceeds data.packs_per_step={self.data.packs_per_step}: "
                "some workers would never get a pack; lower the first or raise the second"
            )
        if self.engine.device == "cpu" and self.cluster.gpus_per_worker:
            raise ValueError(
                f"cluster.gpus_per_worker={self.cluster.gpus_per_worker:g} with engine.device=cpu would hold GPUs that "
                "nothing uses; set the first to 0, or the second to cuda"
            )
        if self.guard.on_spike == "clip" and not self.optim.clip:
            raise ValueError(
                "guard.on_spike=clip with optim.clip=0 would apply a spike as it is; set optim.clip, e.g. to 1.0, or "
                "say guard.on_spike=apply"
            )
        if self.pretext.options and self.engine.kernels != "torch":
            name = next(iter(self.pretext.options))
            raise ValueError(
                f"engine.kernels=triton supports only the paper's task, but pretext.{name} is set; use "
                "engine.kernels=torch, possibly with engine.compile=true"
            )
        return self

    @property
    def data_path(self) -> str:
        """The folder of the data set.

        Raises:
            ConfigError: if neither ``data.path`` nor CDSSL_DATA is set.
        """
        path = self.data.path or os.environ.get("CDSSL_DATA")
        if not path:
            raise ConfigError(
                "no data set given: set data.path=FOLDER or CDSSL_DATA=FOLDER "
                "(make one with: cdssl shard SOURCE --out FOLDER)"
            )
        return path

    def digest(self) -> str:
        """SHA-256 of ``decisive``."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """The settings that determine the encoder, without paths, cluster size and bookkeeping."""
        content = self.model_dump(mode="json", exclude={"run", "cluster", "tracking", "registry", "checkpoint"})
        for free in ("path", "prefetch", "cache_gb", "bad_blocks"):  # where and how, but not what is computed
            content["data"].pop(free)
        for free in ("threads", "stage", "device", "compile", "kernels", "recompute"):
            content["engine"].pop(free)
        return content


def packaged(name: str) -> Path:
    """The path of a configuration that ships with the package, e.g. ``pretrain/small.yaml``."""
    installed = Path(str(importlib.resources.files("cdssl_dist"))) / "configs" / name
    checkout = Path(__file__).parent.parent / "configs" / name
    return checkout if checkout.exists() else installed


def _packaged_like(path: Path) -> Path:
    """The packaged configuration that a path ends with, as in ``configs/study/own.yaml``."""
    folder = packaged("")
    found = packaged("/".join(path.parts[-2:]))
    if path.is_absolute() or not found.is_file():
        names = ", ".join(sorted(str(p.relative_to(folder)) for p in folder.glob("*/*.yaml")))
        raise ConfigError(f"{path}: there is no such file; these are packaged: {names}")
    print(f"{path}: not found here, so the packaged {found} is used", file=sys.stderr)
    return found


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a run; if no path is given, the packaged ``pretrain/small.yaml``. See ``read``."""
    return read(Config, Path(path) if path else packaged("pretrain/small.yaml"), overrides)


def read(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read a configuration of any kind.

    Args:
        model: what the file describes.
        path: a YAML file; if it does not exist, the packaged one of that name, such as ``study/own.yaml``.
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        ConfigError: if the file cannot be read, or a key or a value is wrong.
    """
    if not path.exists():
        path = _packaged_like(path)
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as why:
        raise ConfigError(f"{path}: cannot be read ({why.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as why:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(why).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections such as data: and model:")
    for override in overrides:
        _override(content, override)
    return validate(model, content, str(path))


def parse(content: dict[str, Any], where: str = "config") -> Config:
    """Validate the configuration of a run; see ``read``."""
    return validate(Config, content, where)


def validate(model: type[M], content: dict[str, Any], where: str) -> M:
    """Validate a configuration of any kind; see ``read``."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{where}: {_explain(model, e)}" for e in error.errors())) from None


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all([*sections, last]):
        raise ConfigError(f"{override!r}: an override has the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not YAML") from None
    if value == "none":
        raise ConfigError(f"{override!r}: YAML's empty value is null, and none is text")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{override!r}: {section} is not a section")
    content[last] = value


def _explain(model: Any, error: Any) -> str:
    """One line for one of pydantic's errors; for an unknown key, the nearest known one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # from one of our validators, whose message names the setting
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    for part in error["loc"][:-1]:
        model = _inside(model, part)
    known = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    return f"{where}: unknown key{hint}"


def _inside(annotation: Any, part: str | int) -> Any:
    """Return the type of a part of a section, of a mapping of sections, or of an optional section."""
    inner = getattr(annotation, "model_fields", {}).get(part)
    if inner is not None:
        annotation = inner.annotation
    elif get_args(annotation):  # dict[str, Section]
        annotation = get_args(annotation)[-1]
    options = [a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Section)]
    return options[0] if options and type(None) in get_args(annotation) else annotation
