"""Embed crystals with an encoder.

Imports nothing that is compiled, configured or distributed, since the MLflow pyfunc ships this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.data.batch import GraphBatch, collate, widen
from cdssl_dist.data.structures import graphs_of
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.megnet import MEGNet, pooled
from sharding.graph import Multigraphs, offsets

HALF_EDGES: Final = 32_768  # per forward pass, to bound memory


def batch_of(graphs: Multigraphs, device: torch.device) -> GraphBatch:
    """Multigraphs as one batch, without padding to a static shape; the last graph of the batch is padding."""
    arrays = {f.name: getattr(graphs, f.name) for f in fields(graphs)}
    return widen(collate([arrays], [(0, 0)]).to(device))


@torch.inference_mode()
def embed_graphs(encoder: MEGNet, expansion: GaussianExpansion, graphs: Multigraphs) -> NDArray[np.float32]:
    """Mean x̂, mean û and ŝ of each crystal: (G, 3W) f32."""
    device = encoder.initial_state.device
    rows = np.empty((len(graphs), 3 * encoder.width), np.float32)
    for part in parts(graphs, HALF_EDGES):
        batch = batch_of(graphs.take(part), device)
        x, u, s = encoder(expansion(distances(batch, batch.positions)), batch)
        rows[part] = pooled(x, u, s, batch)[: len(part)].cpu().numpy()
    return rows


def embed_structures(
    encoder: MEGNet, expansion: GaussianExpansion, cutoff: float, items: Sequence[Any]
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Embed structures (see ``structures.read_crystal``); refused ones get a row of NaN, and a reason by row."""
    refused: dict[int, str] = {}
    rows = np.full((len(items), 3 * encoder.width), np.nan, np.float32)
    for graphs in graphs_of(items, cutoff, refused):
        rows[[int(key) for key in graphs.keys]] = embed_graphs(encoder, expansion, graphs)
    return rows, refused


def parts(graphs: Multigraphs, half_edges: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of the graphs, in parts of about ``half_edges`` half edges, each of at least one graph."""
    part = offsets(graphs.n_edges)[:-1] // half_edges
    for p in np.unique(part):
        yield np.flatnonzero(part == p)
