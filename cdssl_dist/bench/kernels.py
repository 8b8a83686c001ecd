"""``cdssl bench kernels``: compile all kernel launches of a training step for a GPU that need not be present.

Nothing is executed: Triton compiles each kernel for its arguments in the step, in every configuration that would be
tried on the device, down to machine code. So problems that an interpreter cannot show appear without a GPU: code that
Triton rejects, too much shared memory, and register spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch

from cdssl_dist.bench import step as bench_step
from cdssl_dist.bench.common import BenchError, Figures
from cdssl_dist.data.batch import PackShape, collate, widen
from cdssl_dist.model.edges import GaussianExpansion

SHARED: Final = {80: 163, 90: 227, 100: 227}  # KiB that a program may use: CUDA C++ Programming Guide, table 30
SHAPE: Final = PackShape(8, 64, 1024)  # of a pack; its content makes no difference


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    parser.add_argument("--capability", type=int, choices=SHARED, default=90, help="of the device: 90 is an H100")
    parser.add_argument("--width", type=int, default=32, help="of the model")
    parser.add_argument("--hidden", type=int, default=64, help="of the model")
    parser.add_argument("--dtype", choices=bench_step.DTYPES, default="bf16", help="precision of the weights")
    parser.add_argument("--first", action="store_true", help="compile only the first configuration of each kernel")


def measure(args: Namespace) -> Figures:
    """Resources of each kernel in each configuration.

    Raises:
        BenchError: if Triton is missing or in interpreter mode, or the kernels do not support the size.
    """
    try:
        import triton
    except ImportError:
        raise BenchError("this needs triton, which comes with torch for CUDA") from None
    if triton.knobs.runtime.interpret:
        raise BenchError("TRITON_INTERPRET=1 prevents compilation; unset it")
    from cdssl_dist.model.kernels.model import FusedPretextModel

    expansion = GaussianExpansion(bench_step.CENTERS, 5.0, 0.5)
    try:
        model = FusedPretextModel(expansion=expansion, width=args.width, hidden=args.hidden, blocks=2)
    except ValueError as why:
        raise BenchError(str(why)) from None
    model.to(bench_step.DTYPES[args.dtype])
    batch = widen(collate([], [], SHAPE, np.dtype(np.uint16)))
    distance = torch.ones(SHAPE.half_edges)
    with _compiled(args.capability, args.first) as found:
        model(None, batch, (distance, distance)).backward()
    unique = {(row["kernel"], row["of"], row["tile"], row["warps"]): row for row in found}
    return {"capability": args.capability, "kernels": list(unique.values())}


@contextmanager
def _compiled(capability: int, first: bool) -> Iterator[list[dict[str, Any]]]:
    """Compile the kernels that the body launches, but run none; tensors keep their contents."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    class Absent:
        """Stands for a driver: answers what Triton asks before it compiles."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    found: list[dict[str, Any]] = []
    launch = JITFunction.run

    def compile_alone(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = launch(kernel, *args, grid=grid, warmup=True, **options)
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        about = ", ".join(f"{n.lower()} {given[n]}" for n in ("WIDTH", "HIDDEN", "DENSE", "RESIDUAL") if n in given)
        row = {"kernel": kernel.__name__, "of": about, "tile": options.get("TILE"), "warps": made.metadata.num_warps}
        found.append(row | {"shared": made.metadata.shared} | _resources(made.asm["cubin"]))

    def in_all_shapes(tuner: Any, *args: Any, **options: Any) -> None:
        for config in tuner.configs[:1] if first else tuner.configs:
            tuner.fn.run(*args, **options, **config.all_kwargs())

    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", Absent()))
        stack.enter_context(patch.object(JITFunction, "run", compile_alone))
        stack.enter_context(patch.object(Autotuner, "run", in_all_shapes))
        yield found


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of registers that were spilled."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "spilled": int(found[2])}


def table(figures: Figures) -> str:
    """The figures for people."""
    most = SHARED[figures["capability"]]
    lines = [
        f"for compute capability {figures['capability'] / 10}, which gives a program {most} KiB of shared memory",
        "",
    ]
    lines += [f"{'kernel':18} {'of':46}  edges  warps  registers  spilled, bytes  shared, KiB"]
    for row in figures["kernels"]:
        shared, tile = row["shared"] / 1024, row["tile"] or "–"
        lines.append(
            f"{row['kernel']:18} {row['of']:46}  {tile:>5}  {row['warps']:5}  {row['registers']:9}  {row['spilled']:14}"
            f"  {shared:11.1f}{'  too much' if shared > most else ''}"
        )
    return "\n".join(lines)
