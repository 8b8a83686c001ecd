"""Packs: narrow integers for transfer, and the widened batch, with both edge directions, on the device.

Shape suffixes here and in the model: G graphs, N atoms, H half edges, E = 2H directed edges, K blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_BLOCK = 2**32 - 1  # block number of padding atoms


class PackShape(NamedTuple):
    """Static sizes of a pack, padding included. One graph and one atom are always padding."""

    graphs: int
    atoms: int
    half_edges: int


@dataclass(frozen=True, slots=True)
class RawPack:
    """A pack as it is transferred: per-graph counts, indices within a graph, integers as stored.

    Padding is one last graph that owns all padding atoms and half edges (self edges of its first atom); graphs
    between the real ones and that one are empty.
    """

    n_atoms: Tensor  # (G,) i32
    n_edges: Tensor  # (G,) i32 | half edges
    lattice: Tensor  # (G, 3, 3) f32 | rows, Å
    atomic_numbers: Tensor  # (N,) u8
    positions: Tensor  # (N, 3) f32 | Å
    edge_src: Tensor  # (H,) u8 or u16
    edge_dst: Tensor  # (H,)
    edge_shift: Tensor  # (H, 3) i8
    block: Tensor  # (K + 1,) i64 | block numbers; the last is the padding
    epoch: Tensor  # (K + 1,) i64
    block_atoms: Tensor  # (K + 1,) i64 | atoms of each block
    block_graphs: Tensor  # (K + 1,) i64

    def to(self, device: torch.device) -> RawPack:
        """Copy to a device, asynchronously if the memory is pinned."""
        return RawPack(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin(self) -> RawPack:
        """Copy to pinned memory."""
        return RawPack(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True, slots=True)
class GraphBatch:
    """A pack as model input. Directed edges are sorted by the atom that receives the message."""

    atomic_numbers: Tensor  # (N,) i64
    positions: Tensor  # (N, 3) f32 | clean, Å
    lattice: Tensor  # (G, 3, 3) f32 | rows, Å
    graph_of_atom: Tensor  # (N,) i64
    receiver: Tensor  # (E,) i64 | v
    sender: Tensor  # (E,) i64 | v'
    graph_of_edge: Tensor  # (E,) i64
    row_ptr: Tensor  # (N + 1,) i64 | edges of atom i are row_ptr[i] : row_ptr[i + 1]
    mirror: Tensor  # (E,) i64 | the reverse of each edge
    half: Tensor  # (E,) i64 | the half edge that an edge and its reverse share, of one length
    src: Tensor  # (H,) i64 | ends of the half edges
    dst: Tensor  # (H,) i64
    shift: Tensor  # (H, 3) f32 | image of dst, in cells
    graph_of_half: Tensor  # (H,) i64
    scored: Tensor  # (E,) bool | between different atoms: not self images, not padding
    atoms_of_graph: Tensor  # (G,) i64
    edges_of_graph: Tensor  # (G,) i64 | directed
    noise_counter: Tensor  # (N, 3) i64 | epoch, block, atom in block
    graph_counter: Tensor  # (G, 3) i64 | epoch, block, graph in block

    @property
    def edges_of_atom(self) -> Tensor:
        """Directed edges that each atom receives: (N,) i64."""
        return self.row_ptr.diff()

    @property
    def n_graphs(self) -> int:
        """G, padding included."""
        return len(self.lattice)

    @property
    def n_atoms(self) -> int:
        """N, padding included."""
        return len(self.positions)


def collate(
    blocks: Sequence[dict[str, NDArray[Any]]],
    numbers: Sequence[tuple[int, int]],
    shape: PackShape | None = None,
    index_dtype: Any = np.uint16,
) -> RawPack:
    """Join decoded blocks into one pack and pad it.

    Args:
        blocks: arrays as ``sharding.block.decode_arrays`` gives them; may be empty when ``shape`` is given.
        numbers: (block number, epoch) of each.
        shape: shape to pad to; if omitted, only the one padding graph and atom are added.
        index_dtype: of the edge indices of the data set.

    Raises:
        ValueError: if the blocks do not fit into the shape.
    """
    graphs = [len(b["n_atoms"]) for b in blocks]
    atoms = [len(b["atomic_numbers"]) for b in blocks]
    edges = [len(b["edge_src"]) for b in blocks]
    shape = shape or PackShape(sum(graphs) + 1, sum(atoms) + 1, sum(edges))
    left = (shape.graphs - sum(graphs), shape.atoms - sum(atoms), shape.half_edges - sum(edges))
    if left[0] < 1 or left[1] < 1 or left[2] < 0:
        raise ValueError(f"a pack of {sum(graphs)} graphs, {sum(atoms)} atoms, {sum(edges)} half edges exceeds {shape}")

    def joined(name: str, rows: int, dtype: Any, tail: tuple[int, ...] = (), last: int = 0) -> Tensor:
        out = np.zeros((rows, *tail), dtype)
        if blocks:
            filled = sum(len(b[name]) for b in blocks)
            np.concatenate([b[name] for b in blocks], out=out[:filled], casting="unsafe")
        if last:
            out[-1] = last
        return torch.from_numpy(out)

    def row(*values: int) -> Tensor:
        return torch.from_numpy(np.array(values, np.int64))

    return RawPack(
        n_atoms=joined("n_atoms", shape.graphs, np.int32, last=left[1]),
        n_edges=joined("n_edges", shape.graphs, np.int32, last=left[2]),
        lattice=joined("lattice", shape.graphs, np.float32, (3, 3)),
        atomic_numbers=joined("atomic_numbers", shape.atoms, np.uint8),
        positions=joined("positions", shape.atoms, np.float32, (3,)),
        edge_src=joined("edge_src", shape.half_edges, index_dtype),
        edge_dst=joined("edge_dst", shape.half_edges, index_dtype),
        edge_shift=joined("edge_shift", shape.half_edges, np.int8, (3,)),
        block=row(*(n for n, _ in numbers), NO_BLOCK),
        epoch=row(*(e for _, e in numbers), 0),
        block_atoms=row(*atoms, left[1]),
        block_graphs=row(*graphs, left[0]),
    )


def widen(raw: RawPack) -> GraphBatch:
    """Widen integers to 64 bits, index into the whole pack, and add both directions of every edge, sorted by receiver.

    Runs on the device of ``raw``; all shapes follow from the shapes of ``raw`` alone.
    """
    n_graphs, n_total, half = len(raw.n_atoms), len(raw.positions), len(raw.edge_src)
    device = raw.n_atoms.device
    atoms_of_graph, edges_of_graph = raw.n_atoms.long(), raw.n_edges.long()
    graphs = torch.arange(n_graphs, device=device)
    graph_of_atom = torch.repeat_interleave(graphs, atoms_of_graph, output_size=n_total)
    graph_of_half = torch.repeat_interleave(graphs, edges_of_graph, output_size=half)
    first_atom = torch.cumsum(atoms_of_graph, 0) - atoms_of_graph
    first_of_half = first_atom.index_select(0, graph_of_half)
    src, dst = raw.edge_src.long() + first_of_half, raw.edge_dst.long() + first_of_half

    # The half list is sorted by src, so sort only by dst. Of an atom's edges, those that it is the src of come first.
    atoms, halves = torch.arange(n_total + 1, device=device), torch.arange(half, device=device)
    sorted_dst, by_dst = torch.sort(dst.int(), stable=True)
    as_src, as_dst = torch.searchsorted(src, atoms), torch.searchsorted(sorted_dst, atoms.int())
    row_ptr = as_src + as_dst
    forward = halves + as_dst.index_select(0, src)  # places of the edges that src receives, and of their reverses
    backward = torch.empty_like(forward)
    backward[by_dst] = halves + as_src[1:].index_select(0, sorted_dst)
    place = torch.cat([forward, backward])

    def placed(of_src: Tensor, of_dst: Tensor) -> Tensor:
        both = torch.cat([of_src, of_dst])
        return torch.empty_like(both).index_copy_(0, place, both)

    receiver = torch.repeat_interleave(atoms[:-1], row_ptr.diff(), output_size=2 * half)
    sender = placed(dst, src)

    return GraphBatch(
        atomic_numbers=raw.atomic_numbers.long(),
        positions=raw.positions,
        lattice=raw.lattice,
        graph_of_atom=graph_of_atom,
        receiver=receiver,
        sender=sender,
        graph_of_edge=graph_of_atom.index_select(0, receiver),
        row_ptr=row_ptr,
        mirror=placed(backward, forward),
        half=placed(halves, halves),
        src=src,
        dst=dst,
        shift=raw.edge_shift.float(),
        graph_of_half=graph_of_half,
        scored=receiver != sender,
        atoms_of_graph=atoms_of_graph,
        edges_of_graph=2 * edges_of_graph,
        noise_counter=_counter(raw, raw.block_atoms, n_total),
        graph_counter=_counter(raw, raw.block_graphs, n_graphs),
    )


def _counter(raw: RawPack, counts: Tensor, total: int) -> Tensor:
    """(epoch, block, index in block) of every item of every block: (total, 3)."""
    block = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)
    first = torch.cumsum(counts, 0) - counts
    index = torch.arange(total, device=counts.device) - first.index_select(0, block)
    return torch.stack([raw.epoch.index_select(0, block), raw.block.index_select(0, block), index], dim=1)


def to_pyg(batch: GraphBatch) -> Any:
    """Convert the batch into a ``torch_geometric.data.Batch``, without its padding graphs.

    ``edge_index[0]`` is the sender and ``[1]`` the receiver, as torch_geometric passes messages.
    """
    from torch_geometric.data import Batch, Data

    real = [g for g in range(batch.n_graphs - 1) if batch.atoms_of_graph[g]]
    first = torch.cumsum(batch.atoms_of_graph, 0) - batch.atoms_of_graph
    # For an edge to an atom's own image, either direction may be taken as the stored one.
    edge = torch.arange(len(batch.mirror), device=batch.mirror.device)
    stored = (batch.receiver == batch.src[batch.half]) & (batch.scored | (edge < batch.mirror))
    shift = torch.where(stored[:, None], batch.shift[batch.half], -batch.shift[batch.half])
    data = []
    for g in real:
        atoms, edges = batch.graph_of_atom == g, batch.graph_of_edge == g
        data.append(
            Data(
                z=batch.atomic_numbers[atoms],
                pos=batch.positions[atoms],
                cell=batch.lattice[g][None],
                edge_index=torch.stack([batch.sender[edges], batch.receiver[edges]]) - first[g],
                shift=shift[edges],
            )
        )
    return Batch.from_data_list(data)
