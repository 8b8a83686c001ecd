"""``cdssl inspect --html``: one page that needs no network and no script; all text that comes from data is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from sharding.crystal import ATOMIC_NUMBER, SYMBOLS
from sharding.page_style import STYLE

_CLASSES: Final = 7  # of the heat map, equally wide in the logarithm of the count
_DUPLICATES: Final = (
    "duplicate, duplicate_key and excluded are not errors: the crystal, or a twin, is already here or is excluded."
)


def page(found: dict[str, Any], name: str) -> str:
    """The page for what ``summary.inspect`` found in the data set of this name."""
    sections = [
        _section("Splits", _splits(found)),
        _section(
            "Sizes",
            '<div class="two">',
            _histogram(found["sizes"]["atoms"], "Atoms in the cell"),
            _histogram(found["sizes"]["edges"], "Directed edges of a crystal"),
            "</div>",
            _budgets(found["budgets"]),
        ),
        _section(f"{len(found['elements'])} elements", _heat_map(found)),
        _section("Labels", _labels(found["labels"])) if found["labels"] else "",
        _section("Refused", _refused(found)),
        _section("Largest crystals", _largest(found["largest"])),
        _section("Sources", _sources(found["sources"])),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}: crystals in shards</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{_text(name)}</h1><p class='sub'>Periodic multigraphs with edges up to {found['cutoff']:g} Å; "
        f"format version {found['version']}, seed {found['seed']}</p>{_tiles(found)}{''.join(sections)}"
        f"<footer>digest <code>{escape(found['digest'])}</code></footer></main></body></html>\n"
    )


def _text(text: str) -> str:
    """Escape untrusted text, and isolate its writing direction from the text around it."""
    return f"<bdi>{escape(text)}</bdi>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _short(n: float) -> str:
    """1,234 → 1.2k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.{1 if n < 9.95 * size else 0}f}{unit}"
    return f"{n:g}"


def _tiles(found: dict[str, Any]) -> str:
    tiles = [
        ("crystals", f"{found['graphs']:,}"),
        ("atoms", f"{found['atoms']:,}"),
        ("directed edges", f"{found['edges']:,}"),
        ("blocks", f"{found['blocks']:,}"),
        (f"shard{'s' * (found['shards'] != 1)}, {found['bytes'] / 1e6:,.1f} MB", f"{found['shards']:,}"),
        ("fill of the edge budget", f"{found['fill']:.1%}"),
        ("bytes per directed edge", f"{found['bytes_per_edge']:.2f}"),
        ("refused", f"{sum(found['quarantined'].values()):,}"),
    ]
    return "<dl>" + "".join(f"<div><dd>{value}</dd><dt>{title}</dt></div>" for title, value in tiles) + "</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table; cells are already HTML, and numbers are right-aligned."""
    kind = ['<{} class="t">' if i < text_columns else "<{}>" for i in range(len(head))]
    top = "".join(k.format("th") + h + "</th>" for k, h in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(k.format("td") + c + "</td>" for k, c in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _splits(found: dict[str, Any]) -> str:
    some = {name: s for name, s in found["splits"].items() if s["graphs"]}
    bar = "".join(
        f'<i class="s{i}" style="flex:{s["graphs"]}" title="{name}: {s["graphs"]:,} crystals"></i>'
        for i, (name, s) in enumerate(some.items())
    )
    rows = [
        [f'<i class="dot s{i}"></i>{name}', f"{s['graphs'] / found['graphs']:.1%}"]
        + [f"{s[n]:,}" for n in ("graphs", "atoms", "edges", "blocks")]
        + [f"{s['fill']:.1%}"]
        for i, (name, s) in enumerate(some.items())
    ]
    head = ["split", "share", "crystals", "atoms", "directed edges", "blocks", "fill"]
    return f'<div class="bar">{bar}</div>{_table(head, rows)}'


def _histogram(sizes: dict[str, Any], title: str) -> str:
    """Bars over powers of two, with their counts written on them."""
    bins = sizes["histogram"]
    width, height, floor, roof = 380, 190, 168, 18
    step = width / max(len(bins), 1)
    most = max((b["graphs"] for b in bins), default=1)
    bars = []
    for i, b in enumerate(bins):
        tall = b["graphs"] / most * (floor - roof)
        tall = max(tall, 1.5) if b["graphs"] else 0
        x, middle = i * step + 1.5, (i + 0.5) * step
        label = _short(b["to"]) if b["to"] < 1000 else _binary(b["to"])
        told = f"{b['over'] + 1:,} to {b['to']:,}: {b['graphs']:,} crystals"
        bars.append(
            f"<g><title>{told}</title>"
            f'<rect x="{x:.1f}" y="{floor - tall:.1f}" width="{step - 3:.1f}" height="{tall:.1f}" rx="2"/>'
            f'<text x="{middle:.1f}" y="{floor - tall - 4:.1f}">{_short(b["graphs"])}</text>'
            f'<text class="x" x="{middle:.1f}" y="{floor + 14}">{label}</text></g>'
        )
    said = f"mean {sizes['mean']:,.1f} · median {sizes['median']:,} · 99% up to {sizes['p99']:,} · max {sizes['max']:,}"
    return (
        f'<figure><figcaption><b>{title}</b><br>{said}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Histogram: {title}">{"".join(bars)}<path d="M0 {floor + 0.5}H{width}"/></svg>'
        '<p class="note">number of crystals by size; each bar covers sizes up to the power of two below it</p></figure>'
    )


def _binary(n: int) -> str:
    """1024 → 1K, as bars over powers of two are labelled."""
    return f"{n >> 10}K" if n < 2**20 else f"{n >> 20}M"


def _budgets(budgets: Sequence[dict[str, Any]]) -> str:
    rows = [[f"{b['edges']:,}", f"{b['refused']:,}", f"{b['share']:.3%}", f"{b['of']:,}"] for b in budgets]
    head = ["block budget, directed edges", "crystals over it", "share", "crystals"]
    return _table(head, rows) if rows else ""


def _place(z: int) -> tuple[int, int]:
    """Row and column of an element in the table of 18 columns; the lanthanides and actinides stand below."""
    if 57 <= z <= 71 or 89 <= z <= 103:
        return (9, z - 57 + 3) if z <= 71 else (10, z - 89 + 3)
    ends = (2, 10, 18, 36, 54, 86, 118)
    period = next(i for i, end in enumerate(ends) if z <= end)
    left = z - (ends[period - 1] if period else 0)
    right = 18 - (ends[period] - z)
    return period + 1, left if left <= (1 if period == 0 else 2 if period < 3 else 3) else right


def _heat_map(found: dict[str, Any]) -> str:
    elements, graphs = found["elements"], max(found["graphs"], 1)
    most = max(elements.values(), default=1)
    cells = []
    for symbol in SYMBOLS[1:]:
        row, column = _place(ATOMIC_NUMBER[symbol])
        n = elements.get(symbol, 0)
        kind = 1 + min(int(_CLASSES * math.log(n) / math.log(most + 1)), _CLASSES - 1) if n else 0
        told = f"{symbol}: {n:,} crystals, {n / graphs:.2%}"
        cells.append(
            f'<div class="e q{kind}" style="grid-area:{row}/{column}" title="{told}"><b>{symbol}</b>'
            f"<span>{_short(n) if n else ''}</span></div>"
        )
    lowest = [math.ceil((most + 1) ** (i / _CLASSES)) for i in range(_CLASSES)]
    legend = "".join(f'<span><i class="q{i + 1}"></i>{_short(n)}+</span>' for i, n in enumerate(lowest))
    rows = [[symbol, f"{n:,}", f"{n / graphs:.2%}"] for symbol, n in elements.items()]
    return (
        f'<div class="elements">{"".join(cells)}</div><p class="legend">crystals with the element <span>'
        f'<i class="q0"></i>none</span>{legend}</p><details><summary>All elements as a table</summary>'
        f"{_table(['element', 'crystals', 'share'], rows)}</details>"
    )


def _labels(labels: dict[str, dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4g}"

    rows = [
        [_text(name), _text(a["unit"]), _text(a["column"]), f"{a['missing']:.1%}", *map(number, values)]
        for name, a in labels.items()
        for values in [(a["min"], a["mean"], a["max"])]
    ]
    return _table(["label", "unit", "column", "missing", "min", "mean", "max"], rows, 3)


def _refused(found: dict[str, Any]) -> str:
    counts = sorted(found["quarantined"].items(), key=lambda item: -item[1])
    if not counts:
        return "<p>Nothing was refused.</p>"
    most, offered = counts[0][1], found["graphs"] + sum(n for _, n in counts)
    rows = [
        [_text(code), f'<span class="h" style="width:{100 * n / most:.1f}%"></span>', f"{n:,}", f"{n / offered:.3%}"]
        for code, n in counts
    ]
    examples = [
        [
            _text(code),
            _text(r["key"]),
            _text(f"{r['source']}, {r['position']}"),
            f'<span class="w">{_text(r["text"])}</span>',
        ]
        for code, some in found["refusals"].items()
        for r in some
    ]
    head = ["reason", "key", "where", "what is wrong"]
    return (
        f'<div class="reasons">{_table(["reason", "", "crystals", "share"], rows, 2)}</div>'
        f"{_DUPLICATES if any(found['duplicates'].values()) else ''}"
        f"<details><summary>Some of them</summary>{_table(head, examples, 4)}</details>"
    )


def _largest(crystals: Sequence[dict[str, Any]]) -> str:
    rows = [[_text(c["key"]), _text(c["formula"]), f"{c['atoms']:,}", f"{c['edges']:,}"] for c in crystals]
    return _table(["key", "formula", "atoms", "directed edges"], rows, 2)


def _sources(sources: Sequence[dict[str, Any]]) -> str:
    rows = [[_text(s["name"]), _text(s["licence"]), _text(s["cite"]), f"{s['graphs']:,}"] for s in sources]
    return _table(["source", "licence", "to cite", "crystals"], rows, 3)
