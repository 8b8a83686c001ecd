"""Loaders to compare ours with: webdataset with a sample for each graph, torch_geometric's loader, matgl's collate."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from cdssl_dist.bench.common import PYTHON, Figures, elsewhere
from cdssl_dist.data.batch import collate, to_pyg, widen
from cdssl_dist.data.dataset import DataSet
from sharding.block import decode, decode_arrays
from sharding.graph import Multigraphs

Contestants = dict[str, Callable[[], float]]  # name → seconds of CPU for all crystals
ARRAYS = ("lattice", "atomic_numbers", "positions", "edge_src", "edge_dst", "edge_shift")


@contextlib.contextmanager
def contestants(data: DataSet, blocks: list[int], count: int) -> Iterator[Contestants]:
    """Yield the contestants that are installed, on the crystals of some blocks, in batches of ``count``."""
    found: Contestants = {}
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as folder:
        if importlib.util.find_spec("webdataset"):
            found["webdataset, a sample for each graph"] = _webdataset(data, blocks, count, Path(folder) / "graphs.tar")
        if importlib.util.find_spec("torch_geometric"):
            found["torch_geometric's DataLoader, graphs in memory"] = _pyg(data, blocks, count)
        yield found


def _graphs(data: DataSet, blocks: list[int]) -> Iterator[Multigraphs]:
    """The crystals one by one."""
    for block in blocks:
        graphs = decode(data.read(block))
        yield from (graphs.take(np.array([i])) for i in range(len(graphs)))


def _webdataset(data: DataSet, blocks: list[int], count: int, path: Path) -> Callable[[], float]:
    """Samples are half lists as we store them, in safetensors (the fastest we know); joined with numpy, not padded."""
    import webdataset as wds

    with wds.TarWriter(str(path)) as tar:
        for i, graph in enumerate(_graphs(data, blocks)):
            arrays = {name: np.ascontiguousarray(getattr(graph, name)) for name in ARRAYS}
            tar.write({"__key__": f"{i:09d}", "safetensors": save(arrays)})

    def joined(samples: list[dict[str, NDArray[Any]]]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.concatenate([s[name] for s in samples])) for name in ARRAYS}

    def run() -> float:
        begin = time.process_time()
        pipeline = (
            wds.WebDataset(str(path), shardshuffle=False)
            .map(lambda sample: load(sample["safetensors"]))
            .batched(count, collation_fn=joined)
        )
        for _ in pipeline:
            pass
        return time.process_time() - begin

    return run


def _pyg(data: DataSet, blocks: list[int], count: int) -> Callable[[], float]:
    """The directed graphs are in memory: nothing is read or checked."""
    from torch_geometric.loader import DataLoader

    graphs = [
        graph
        for block in blocks
        for graph in to_pyg(widen(collate([decode_arrays(data.read(block))], [(0, 0)]))).to_data_list()
    ]

    def run() -> float:
        begin = time.process_time()
        for _ in DataLoader(graphs, batch_size=count):
            pass
        return time.process_time() - begin

    return run


def matgl(data: DataSet, blocks: list[int], count: int, repeat: int) -> Figures:
    """Rates of matgl's collate, with graphs in memory, in its own environment; empty if there is none."""
    if not PYTHON.exists():
        return {}
    graphs = list(_graphs(data, blocks))
    arrays: dict[str, Any] = {name: np.concatenate([getattr(g, name) for g in graphs]) for name in ARRAYS[:3]}
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as folder:
        path = Path(folder) / "crystals.npz"
        np.savez(path, n_atoms=np.concatenate([g.n_atoms for g in graphs]), **arrays)
        edges, seconds = elsewhere("matgl_collate.py", path, count, repeat)
    median = statistics.median(seconds)
    return {"matgl's collate, graphs in memory": {"crystals": len(graphs) / median, "directed edges": edges / median}}
