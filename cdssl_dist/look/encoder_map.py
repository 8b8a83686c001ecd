"""Maps of crystals from an encoder in memory, for the page of a run: no ``cdssl embed`` and ``cdssl map`` needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from cdssl_dist.data.labeled import density, formulas_of, volume_per_atom
from cdssl_dist.data.stream import stream
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.look.map import FEWEST, CrystalMap, draw_map, varied
from sharding.graph import Multigraphs, concatenate

MAPPED: Final = 1000  # crystals, at most: some seconds of one core


def map_of_validation(run: Path, data: str) -> CrystalMap | None:
    """The first validation crystals of a data set, mapped by the encoder of a run."""
    encoder = CrystalEncoder.from_folder(run)
    graphs = _first(MAPPED, (graphs for graphs, _ in stream(data, encoder.cutoff, "val")))
    return map_of(encoder, graphs, "crystals held out of training")


def map_of(
    encoder: CrystalEncoder, graphs: Multigraphs, name: str, more: dict[str, NDArray[np.float64]] | None = None
) -> CrystalMap | None:
    """A map of at most ``MAPPED`` of the crystals; None if there are too few.

    Args:
        encoder: computes their vectors.
        graphs: n crystals.
        name: what is mapped.
        more: numbers to colour by, (n,) each, listed before density, volume and atoms.
    """
    if len(graphs) < FEWEST:
        return None
    some = np.sort(np.random.default_rng(0).permutation(len(graphs))[:MAPPED])
    chosen = graphs.take(some)
    columns = {column: values[some] for column, values in (more or {}).items()}
    columns |= {"density, g/cm³": density(chosen), "volume per atom, Å³": volume_per_atom(chosen)}
    columns |= {"atoms": chosen.n_atoms.astype(np.float64)}
    vectors = StandardScaler().fit_transform(encoder.embed_graphs(chosen).astype(np.float64))
    return draw_map(name, list(chosen.keys), formulas_of(chosen), varied(columns), vectors)


def _first(n: int, parts: Iterable[Multigraphs]) -> Multigraphs:
    found: list[Multigraphs] = []
    for part in parts:
        found.append(part)
        if sum(len(f) for f in found) >= n:
            break
    return concatenate(found)
