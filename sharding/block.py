"""Blocks, the unit of storage: multigraphs up to a budget, as one safetensors member of a tar shard.

Format version 1; the table of arrays is in ``docs/format.md``. Arrays are little-endian, graphs are
concatenated, and edges are the half list of ``graph.Multigraphs``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from sharding.graph import Multigraphs, offsets

LABEL_PREFIX: Final = "y."


@dataclass(frozen=True, slots=True)
class Budget:
    """The maximum contents of one block. A pack of k blocks never exceeds k budgets, so its padded shape is known."""

    edges: int = 65_536  # directed edges
    atoms: int = 4_096
    graphs: int = 1_024


class BlockError(ValueError):
    """A block cannot be decoded; the message says why."""


def encode(graphs: Multigraphs, index_dtype: Any) -> bytes:
    """Serialise a block.

    Args:
        graphs: the graphs to store.
        index_dtype: dtype of the edge indices, u8 or u16; the same for the whole data set.
    """
    keys = [key.encode() for key in graphs.keys]
    arrays = {
        "n_atoms": graphs.n_atoms.astype(np.uint32),
        "n_edges": graphs.n_edges.astype(np.uint32),
        "lattice": graphs.lattice.astype(np.float32),
        "atomic_numbers": graphs.atomic_numbers.astype(np.uint8),
        "positions": graphs.positions.astype(np.float32),
        "edge_src": graphs.edge_src.astype(index_dtype),
        "edge_dst": graphs.edge_dst.astype(index_dtype),
        "edge_shift": graphs.edge_shift.astype(np.int8),
        "key": np.frombuffer(b"".join(keys), np.uint8),
        "key_offsets": offsets(np.array([len(key) for key in keys], np.uint32)).astype(np.uint32),
    }
    arrays |= {LABEL_PREFIX + name: values.astype(np.float32) for name, values in graphs.labels.items()}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


_DTYPES: Final = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I8": np.int8,
    "F32": np.float32,
}
_INDEX: Final = ("U8", "U16")
_FORMAT: Final[dict[str, tuple[tuple[str, ...], list[int]]]] = {  # name → types, and shape after the first axis
    "n_atoms": (("U32",), []),
    "n_edges": (("U32",), []),
    "lattice": (("F32",), [3, 3]),
    "atomic_numbers": (("U8",), []),
    "positions": (("F32",), [3]),
    "edge_src": (_INDEX, []),
    "edge_dst": (_INDEX, []),
    "edge_shift": (("I8",), [3]),
    "key": (("U8",), []),
    "key_offsets": (("U32",), []),
}
_LABEL: Final[tuple[tuple[str, ...], list[int]]] = (("F32",), [])


def decode_arrays(data: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """The arrays of a block, as views of ``data``: nothing is copied.

    The header is parsed here rather than by safetensors, which copies every array: this runs for every block of a step.

    Raises:
        BlockError: if ``data`` is not a safetensors file, or an array is missing or has the wrong type or shape.
    """
    view = memoryview(data)
    try:
        header, body = _header(view)
        for name in header.keys() | _FORMAT.keys():
            dtypes, tail = _LABEL if name.startswith(LABEL_PREFIX) else _FORMAT[name]
            if header[name]["dtype"] not in dtypes or header[name]["shape"][1:] != tail:
                raise ValueError(f"{name} is {header[name]['dtype']} {header[name]['shape']}, not what the format says")
        return {name: _array(body, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as why:
        raise BlockError(f"not a block: {why}") from why


def views(data: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file of our own making, as views of it."""
    header, body = _header(memoryview(data))
    return {name: _array(body, entry) for name, entry in header.items()}


def _header(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The entries of a safetensors file, and the bytes that they point into."""
    size = 8 + int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8:size]))
    header.pop("__metadata__", None)
    return header, view[size:]


def _array(body: memoryview, entry: dict[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(body):
        raise ValueError(f"bytes {begin} to {end} of {len(body)}")
    return np.frombuffer(body[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])


def decode(data: bytes | memoryview) -> Multigraphs:
    """Parse a complete block, with its keys and labels.

    Raises:
        BlockError: if it is not a valid block, or its arrays contradict one another.
    """
    arrays = decode_arrays(data)
    try:
        graphs = Multigraphs(
            keys=_keys(arrays["key"].tobytes(), arrays["key_offsets"].astype(np.int64)),
            n_atoms=arrays["n_atoms"],
            n_edges=arrays["n_edges"],
            lattice=arrays["lattice"],
            atomic_numbers=arrays["atomic_numbers"],
            positions=arrays["positions"],
            edge_src=arrays["edge_src"],
            edge_dst=arrays["edge_dst"],
            edge_shift=arrays["edge_shift"],
            labels={n.removeprefix(LABEL_PREFIX): v for n, v in arrays.items() if n.startswith(LABEL_PREFIX)},
        )
    except ValueError as why:
        raise BlockError(f"not a block: {why}") from why
    consistent = (
        len(graphs.keys) == len(graphs.n_atoms) == len(graphs.n_edges) == len(graphs.lattice)
        and int(graphs.n_atoms.sum()) == len(graphs.atomic_numbers) == len(graphs.positions)
        and int(graphs.n_edges.sum()) == len(graphs.edge_src) == len(graphs.edge_dst) == len(graphs.edge_shift)
        and all(len(values) == len(graphs) for values in graphs.labels.values())
    )
    if not consistent:
        raise BlockError("not a block: the lengths of its arrays contradict one another")
    return graphs


def _keys(text: bytes, at: NDArray[np.int64]) -> list[str]:
    if len(at) == 0 or at[0] != 0 or at[-1] != len(text) or (np.diff(at) < 0).any():
        raise ValueError("the key offsets do not divide the keys")
    ends = at.tolist()
    return [text[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]
