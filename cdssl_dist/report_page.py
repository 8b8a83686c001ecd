"""The page of ``cdssl report``: drawings as SVG, values on pointing, no network; all text from data is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from sharding.page_style import STYLE

WIDTH, HEIGHT, LEFT, FLOOR, ROOF = 640, 230, 56, 200, 12
POINTS: Final = 600  # of a line, at most
CHARTS: Final = (  # title, lines, whether the axis is logarithmic, whether events are marked
    ("Loss", ("train/loss", "val/loss"), True, False),
    ("Skill beyond each distance alone", ("train/skill_edge", "val/skill_edge"), False, False),
    ("Skill against the noisy edges", ("train/skill", "val/skill"), False, False),
    ("Gradient norm, with what the guard did", ("guard/norm",), True, True),
    ("Directed edges per second", ("perf/edges_s",), False, False),
)
MORE: Final = """
.chart svg, .parity svg { width: 100%; height: auto; display: block }
.chart text, .parity text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.chart .y { text-anchor: end } .chart .x { text-anchor: middle }
.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.l0 { stroke: var(--bar) } .l1 { stroke: var(--s1) } .grid { stroke: var(--line); stroke-width: 1 }
.mark { stroke: #c33; stroke-dasharray: 3 3 } .parity circle { fill: var(--bar); opacity: .55 }
.chart output { display: block; min-height: 1.5em; font-variant-numeric: tabular-nums; font-size: .9rem }
.chart { margin-bottom: 26px; break-inside: avoid } pre { overflow-x: auto; font-size: .85rem }
.parities { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 16px }
"""
SCRIPT: Final = """
"use strict";
for (const figure of document.querySelectorAll(".chart")) {
  const lines = JSON.parse(figure.querySelector("script").textContent), svg = figure.querySelector("svg");
  const out = figure.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    out.textContent = Object.entries(lines).map(([name, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      return `${name} ${Number(near[2].toPrecision(4))} at step ${near[1]}`;
    }).join("   ");
  });
}
"""


def page(
    name: str,
    status: Mapping[str, Any],
    card: Mapping[str, Any],
    config: str,
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    tuned: Sequence[tuple[Mapping[str, Any], Mapping[str, list[Any]]]],
) -> str:
    """The page.

    Args:
        name: of the run.
        status, card, config: contents of ``status.json``, ``encoder.json`` and ``config.yaml``, empty where missing.
        metrics, events: lines of ``metrics.jsonl`` and ``events.jsonl``.
        tuned: results and columns of predictions of each fine-tuning.
    """
    last = {k: v for line in metrics for k, v in line.items() if isinstance(v, (int, float))}
    tiles: dict[str, str] = {
        "state": str(status.get("state", "?")),
        "step": f"{last['step']:,.0f} of {status.get('steps', '?')}",
        **{k: f"{last[k]:.4g}" for k in ("val/loss", "val/skill", "val/skill_edge") if k in last},
        "guard's events": f"{len(events):,}",
    }
    drawn = [_chart(title, names, log, marked, metrics, events) for title, names, log, marked in CHARTS]
    parts = [_section("How it went", "".join(drawn))]
    if events:
        rows = [[str(e.get("step", "")), str(e.get("event", "")), _rest(e)] for e in events[:200]]
        parts.append(_section("Events", _table(["step", "event", "more"], rows)))
    parts += [_tuned(results, rows) for results, rows in tuned]
    if card:
        sources = [[str(s.get(k, "")) for k in ("name", "licence", "cite")] for s in card.get("sources", [])]
        digests = [[k, str(card[k])] for k in ("data_digest", "config_digest", "weights_sha256") if k in card]
        parts.append(_section("Data", _table(["source", "licence", "to cite"], sources) + _table(["", ""], digests)))
    if config:
        parts.append(
            _section("Configuration", f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
        )
    dl = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(key)}</dt></div>" for key, value in tiles.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(name)}: a pretraining run</title><style>{STYLE}{MORE}</style></head><body><main>"
        f"<h1>{escape(name)}</h1><p class='sub'>A pretraining run</p><dl>{dl}</dl>{''.join(parts)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text, and are escaped."""
    top = "".join(f'<th class="t">{escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f'<td class="t">{escape(c)}</td>' for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _rest(event: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in event.items() if k not in ("step", "time", "event")})


def _chart(
    title: str,
    names: Sequence[str],
    logarithmic: bool,
    marked: bool,
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> str:
    """Lines over steps; nothing where none was recorded."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        found = [(float(m["step"]), float(m[name])) for m in metrics if isinstance(m.get(name), (int, float))]
        found = [(s, v) for s, v in found if math.isfinite(v) and (v > 0 or not logarithmic)]
        if found:
            series[name] = found[:: max(1, math.ceil(len(found) / POINTS))]
    if not series:
        return ""
    scale = math.log10 if logarithmic else float
    steps = [s for points in series.values() for s, _ in points]
    values = [scale(v) for points in series.values() for _, v in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    wide, tall = (last - first) or 1.0, (high - low) or 1.0

    def across(step: float) -> float:
        return LEFT + (step - first) / wide * (WIDTH - LEFT - 10)

    def up(value: float) -> float:
        return FLOOR - (value - low) / tall * (FLOOR - ROOF)

    drawn = []
    for share in (0.0, 0.5, 1.0):
        value, step = low + share * tall, first + share * wide
        shown = 10**value if logarithmic else value
        drawn.append(f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - 10}"/>')
        drawn.append(f'<text class="y" x="{LEFT - 6}" y="{up(value) + 4:.1f}">{shown:.3g}</text>')
        drawn.append(f'<text class="x" x="{min(across(step), WIDTH - 24):.1f}" y="{FLOOR + 18}">{step:,.0f}</text>')
    for event in events if marked else ():
        x = across(float(event.get("step", first)))
        told = escape(f"{event.get('event')} at step {event.get('step')}")
        drawn.append(f'<path class="mark" d="M{x:.1f} {ROOF}V{FLOOR}"><title>{told}</title></path>')
    where: dict[str, list[list[float]]] = {}
    for i, (name, points) in enumerate(series.items()):
        where[name] = [[round(across(s), 1), s, v] for s, v in points]
        line = "L".join(f"{across(s):.1f} {up(scale(v)):.1f}" for s, v in points)
        drawn.append(f'<path class="l{i}" d="M{line}"/>')
    legend = " ".join(f'<span><i class="dot s{i}"></i>{escape(name)}</span>' for i, name in enumerate(series))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">{"".join(drawn)}</svg>'
        f'<output></output><script type="application/json">{json.dumps(where)}</script></figure>'
    )


def _tuned(results: Mapping[str, Any], rows: Mapping[str, list[Any]]) -> str:
    """Errors of a fine-tuning, and true against predicted."""
    errors, task = results["errors"], results["task"]
    names = list(next(iter(errors.values())))
    table = _table(["", *names], [[arm, *(f"{own[n]:.4g}" for n in names)] for arm, own in errors.items()])
    plots = []
    for target in [] if task["classes"] else task["targets"]:
        for arm in ("pretrained", "from scratch"):
            if (column := f"{arm}:{target['name']}") in rows:
                pairs = zip(rows[f"true:{target['name']}"], rows[column], strict=True)
                plots.append(_parity(f"{arm}: {target['name']}, {target['unit']}", [p for p in pairs if _finite(*p)]))
    about = f"<p class='note'>fine-tuned from {escape(str(results['encoder']['ref']))}; errors of the test crystals</p>"
    title = "Fine-tuned: " + ", ".join(t["name"] for t in task["targets"])
    return _section(title, f"{about}{table}<div class='parities'>{''.join(plots)}</div>")


def _finite(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _parity(title: str, pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return ""
    pairs = pairs[:: max(1, math.ceil(len(pairs) / 1500))]
    low, high = min(min(p) for p in pairs), max(max(p) for p in pairs)
    unit = 260 / ((high - low) or 1.0)
    dots = "".join(
        f'<circle cx="{20 + (t - low) * unit:.1f}" cy="{280 - (p - low) * unit:.1f}" r="3"/>' for t, p in pairs
    )
    return (
        f'<figure class="parity"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 300 300" role="img" '
        f'aria-label="predicted against true"><path class="grid" d="M20 280L280 20"/>{dots}'
        f'<text x="20" y="296">true {low:.3g} to {high:.3g}</text></svg></figure>'
    )
