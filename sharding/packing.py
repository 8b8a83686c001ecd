"""Graphs → blocks of nearly equal work: bin packing, once, offline.

Best fit in the order of a seeded hash of the keys, over a window of open blocks: a graph goes into the fullest block
that still has room for it. First-fit decreasing fills blocks equally well but sorts by size, so that a block
would hold crystals of one size only; gradients need a mix.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from sharding.block import Budget
from sharding.jit import compiled

OPEN_BLOCKS: Final = 64


def shuffled(keys: list[str], seed: int) -> NDArray[np.int64]:
    """Order the keys by a seeded hash: a shuffle that does not depend on the order in which they come."""
    hashes = [xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys]
    return np.array(sorted(range(len(keys)), key=lambda i: (hashes[i], keys[i])), np.int64)


@compiled
def _best_fit(
    edges: NDArray[Any],
    atoms: NDArray[Any],
    max_edges: int,
    max_atoms: int,
    max_graphs: int,
    window: int,
    block_of: NDArray[Any],
) -> int:
    """Assign a block to every graph, in the order given; returns the number of blocks."""
    open_blocks = np.empty(window, np.int64)
    left_edges = np.empty(window, np.int64)
    left_atoms = np.empty(window, np.int64)
    left_graphs = np.empty(window, np.int64)
    n_open = 0
    n_blocks = 0
    for i in range(len(edges)):
        best = -1
        for b in range(n_open):
            fits = edges[i] <= left_edges[b] and atoms[i] <= left_atoms[b] and left_graphs[b] > 0
            if fits and (best < 0 or left_edges[b] < left_edges[best]):
                best = b
        if best < 0:
            if n_open < window:
                best = n_open
                n_open += 1
            else:  # close the fullest
                best = int(np.argmin(left_edges))
            open_blocks[best] = n_blocks
            n_blocks += 1
            left_edges[best], left_atoms[best], left_graphs[best] = max_edges, max_atoms, max_graphs
        block_of[i] = open_blocks[best]
        left_edges[best] -= edges[i]
        left_atoms[best] -= atoms[i]
        left_graphs[best] -= 1
    return n_blocks


def pack(edges: NDArray[Any], atoms: NDArray[Any], budget: Budget) -> tuple[NDArray[np.int64], int]:
    """Pack graphs, in the order given, into blocks.

    Args:
        edges: (G,) directed edges of each graph, none over the budget.
        atoms: (G,) atoms of each graph, none over the budget.
        budget: the limits of one block.

    Returns:
        The block of every graph, (G,), and the number of blocks. Blocks are numbered as they are opened.
    """
    assert len(edges) == 0 or (max(edges) <= budget.edges and max(atoms) <= budget.atoms)
    block_of = np.empty(len(edges), np.int64)
    sizes = np.ascontiguousarray(edges, np.int64), np.ascontiguousarray(atoms, np.int64)
    n = _best_fit(*sizes, budget.edges, budget.atoms, budget.graphs, OPEN_BLOCKS, block_of)
    return block_of, int(n)
