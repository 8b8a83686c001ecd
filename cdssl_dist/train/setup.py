"""What a run computes with: device, plan, network, and the task that matches the network's edge path."""

from __future__ import annotations

import os
import shutil

import torch

from cdssl_dist.config import Config
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.beyond import BeyondDenoising, BeyondModel, CompiledBeyond, Options
from cdssl_dist.model.compiled import CompiledDenoising, NoCompilerError, compile_model
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising


class SetupError(ValueError):
    """What the configuration asks for is not available here; the message is one line."""


def device_of(config: Config) -> torch.device:
    """The GPU of this rank, or the CPU.

    Raises:
        SetupError: if a GPU is asked for but this worker has none.
    """
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            "engine.device=cuda, but this worker sees no GPU; set cluster.gpus_per_worker=1, or engine.device=cpu"
        )
    cuda = config.engine.device == "cuda" or (config.engine.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def plan_of(config: Config, data: DataSet) -> EpochPlan:
    """Which training blocks are in which step."""
    table = data.table("train").part(config.data.share)
    return EpochPlan(table, config.noise.seed, config.data.blocks_per_pack, config.data.packs_per_step)


def model_and_task(config: Config, device: torch.device, cutoff: float) -> tuple[PretextModel, Denoising]:
    """Build the network, and the task that matches its edge path.

    Args:
        config: of the run.
        device: of this rank.
        cutoff: of the graphs, Å; centres of the expansion reach beyond it by ``graph.margin``.

    Raises:
        SetupError: if this machine or this model size does not support the configured edge path.
    """
    size = config.model.sizes
    expansion = GaussianExpansion(config.graph.centers, cutoff + config.graph.margin, config.graph.gamma)
    about = (expansion, config.noise.range, config.noise.seed)
    if config.engine.kernels == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            if device.type != "cuda":
                raise SetupError("engine.kernels=triton needs a GPU, which this worker lacks; use engine.kernels=torch")
            if not any(name and shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang")):
                raise SetupError("engine.kernels=triton needs a C compiler, to launch kernels; install gcc, or set CC")
        try:
            from cdssl_dist.model.kernels.model import FusedDenoising, FusedPretextModel

            return FusedPretextModel(expansion=expansion, **size), FusedDenoising(*about)
        except (ImportError, ValueError) as why:  # no Triton, which comes with torch for CUDA; or another width
            raise SetupError(f"engine.kernels=triton: {why}") from None
    compiled = config.engine.compile
    size |= {"edge_features": expansion.centers, "recompute": config.engine.recompute}
    model: PretextModel
    task: Denoising
    if config.pretext.options:
        options = Options(**config.pretext.options)
        model = BeyondModel(options=options, **size)
        task = (CompiledBeyond if compiled else BeyondDenoising)(*about, options)
    else:
        model = PretextModel(**size)
        task = (CompiledDenoising if compiled else Denoising)(*about)
    if compiled:
        try:
            compile_model(model)
        except NoCompilerError as why:
            raise SetupError(f"engine.compile: {why}") from None
    return model, task
