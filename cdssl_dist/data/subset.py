"""A selection of a data set's crystals for downstream jobs, by rows of its graph table, read block by block.

Only the requested columns of the graph table are read, and only the blocks that hold a selected crystal. The result
is in memory.
"""

from __future__ import annotations

import ast
import difflib
import operator
import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdssl_dist.data.dataset import DataSet
from sharding.block import decode
from sharding.crystal import ATOMIC_NUMBER
from sharding.graph import Multigraphs, concatenate
from sharding.manifest import SPLITS, DataSetError

GRAPHS: Final = "graphs.parquet/"
_COMPARE: Final[dict[type, Callable[[Any, Any], Any]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def select(
    data: DataSet,
    *,
    split: str | None = None,
    keys: Sequence[str] | None = None,
    where: str | None = None,
    having: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> pa.Table:
    """The rows of the graph table that meet all conditions.

    Args:
        data: the data set.
        split: one of ``SPLITS``.
        keys: ids of crystals; the rows come in this order, else in that of the blocks.
        where: see ``condition``.
        having: columns whose values must be neither missing nor NaN.
        columns: to read besides ``key`` and ``block``.

    Raises:
        DataSetError: if a key, a split or a column does not exist, or the condition cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise DataSetError(f"no split {split!r}; known are {', '.join(SPLITS)}")
    wanted = list(dict.fromkeys(["key", "block", *columns]))
    parts = []
    for name in sorted(name for name in data.manifest.tables if name.startswith(GRAPHS)):
        try:
            with data.open(name) as file:
                names = pq.ParquetFile(file).schema_arrow.names
                _known([*columns, *having], names)
                conditions = [condition(where, names)] if where else []
                conditions += [~pc.field(column).is_null(nan_is_null=True) for column in having]
                conditions += [pc.field("key").isin(list(keys))] if keys is not None else []
                needed = dict.fromkeys([*wanted, *having, *(n for n in names if where and n in where)])
                # A part holds one split, so others are skipped; the other conditions are not left to Parquet, which
                # skips row groups by their ranges of values, and these ignore NaN.
                rows = pq.read_table(file, columns=list(needed), filters=[("split", "==", split)] if split else None)
                chosen = rows.filter(reduce(operator.and_, conditions)) if conditions else rows
                parts.append(chosen.select(wanted))
        except pa.ArrowException as why:
            about = f" with the condition {where!r}" if where else ""
            raise DataSetError(f"{data.name}/{name}: cannot be read{about} ({why})") from None
    rows = pa.concat_tables(parts)
    return rows.sort_by("block") if keys is None else _in_order(data, rows, keys, bool(split or where or having))


def read(data: DataSet, rows: pa.Table) -> Multigraphs:
    """Read the crystals of some rows of the graph table, in that order, with their labels.

    Raises:
        DataSetError: if there are no rows, a block is bad, or it does not match the graph table.
    """
    if len(rows) == 0:
        raise DataSetError(f"{data.name}: no crystal meets the conditions")
    keys, blocks = rows["key"].to_pylist(), np.asarray(rows["block"])
    parts: list[Multigraphs] = []
    for block in np.unique(blocks).tolist():
        graphs = decode(data.read(block))
        number = {key: i for i, key in enumerate(graphs.keys)}
        try:
            parts.append(graphs.take(np.array([number[keys[i]] for i in np.flatnonzero(blocks == block)])))
        except KeyError as why:
            raise DataSetError(
                f"{data.name}: block {block} has no {why}; graphs.parquet belongs to another data set"
            ) from None
    found = concatenate(parts)
    place = np.empty(len(keys), np.int64)
    place[np.argsort(blocks, kind="stable")] = np.arange(len(keys))
    return found.take(place)


def formulas(data: DataSet, split: str, blocks: NDArray[Any] | None = None) -> set[str]:
    """The reduced formulas of the crystals of a split, or of some of its blocks."""
    found: set[str] = set()
    these = None if blocks is None else pa.array(blocks.astype(np.int64))
    for name in sorted(name for name in data.manifest.tables if name.startswith(GRAPHS)):
        with data.open(name) as file:
            rows = pq.read_table(file, columns=["formula", "block"], filters=[("split", "==", split)])
        if these is not None:
            rows = rows.filter(pc.is_in(rows["block"].cast(pa.int64()), value_set=these))
        found |= set(pc.unique(rows["formula"]).to_pylist())
    return found


def elements(data: DataSet, split: str, blocks: NDArray[Any] | None = None) -> list[int]:
    """Atomic numbers that occur in a split, or in some of its blocks, by the formulas of the graph table."""
    symbols = {symbol for formula in formulas(data, split, blocks) for symbol in re.findall("[A-Z][a-z]?", formula)}
    return sorted(ATOMIC_NUMBER[symbol] for symbol in symbols)


def condition(text: str, names: Sequence[str]) -> pc.Expression:
    """Parse a condition, in Python syntax: ``0 < y.gap < 3 and source in ["mp", "jarvis"] or n_atoms == 2``.

    Allowed are comparisons (also chained), ``in``, ``is None`` (missing or NaN), ``and``, ``or`` and ``not``, on column
    names, numbers, strings and lists of these. Nothing is executed.

    Args:
        text: the condition.
        names: of the columns that exist.

    Raises:
        DataSetError: if it is anything else, or a column does not exist.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            _known([name], names)
            return pc.field(name)
        constant = ast.literal_eval(node)
        if not isinstance(constant, int | float | str):
            raise ValueError(f"{constant!r} cannot be used in a comparison")
        return constant

    def compared(left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(sign, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
            missing = value(left).is_null(nan_is_null=True)
            return missing if isinstance(sign, ast.Is) else ~missing
        if isinstance(sign, ast.In | ast.NotIn):
            choices = ast.literal_eval(right)
            if not isinstance(choices, list | tuple):
                raise ValueError("'in' needs a list")
            found = value(left).isin(list(choices))
            return found if isinstance(sign, ast.In) else ~found
        return _COMPARE[type(sign)](value(left), value(right))

    def parsed(node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            return reduce(operator.and_ if isinstance(node.op, ast.And) else operator.or_, map(parsed, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~parsed(node.operand)
        if isinstance(node, ast.Compare):
            sides = zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)
            return reduce(operator.and_, (compared(*side) for side in sides))
        raise ValueError("expected a comparison")

    try:
        found = parsed(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(found, pc.Expression):
            raise ValueError("it names no column")
        return found
    except DataSetError:
        raise
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError, RecursionError, pa.ArrowException) as why:
        reason = getattr(why, "msg", None) or why
        raise DataSetError(f"cannot read the condition {text!r} ({reason}); write e.g. 'n_atoms <= 20'") from None


def _known(wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise DataSetError(f"graphs.parquet has no column {name!r}; {hint}")


def _in_order(data: DataSet, rows: pa.Table, keys: Sequence[str], conditions: bool) -> pa.Table:
    """Return rows in the order of ``keys``. A key may fail a further condition, but must be in the data set."""
    place = {key: i for i, key in enumerate(rows["key"].to_pylist())}
    absent = [key for key in keys if key not in place]
    if absent and conditions:
        select(data, keys=absent)
    elif absent:
        listed = ", ".join(map(repr, absent[:3])) + (", …" if len(absent) > 3 else "")
        raise DataSetError(f"{data.name}: {len(absent)} of {len(keys)} keys are not in it: {listed}")
    return rows.take(pa.array([place[key] for key in keys if key in place], pa.int64()))
