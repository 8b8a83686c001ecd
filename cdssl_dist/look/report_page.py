"""The pages of ``cdssl report``: charts as SVG, values on hover, no network access; all text from data is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

from cdssl_dist.look.map_page import MAP_SCRIPT, MAP_STYLE, in_script, section
from sharding.page_style import STYLE

if TYPE_CHECKING:
    from cdssl_dist.look.map import CrystalMap

Tuned = tuple[Mapping[str, Any], Mapping[str, list[Any]], Sequence[Mapping[str, Any]]]

WIDTH, HEIGHT, LEFT, FLOOR, ROOF = 640, 230, 72, 200, 16
POINTS: Final = 600  # of a line, at most
CHARTS: Final = (  # title, lines, whether the axis is logarithmic, whether events are marked
    ("Loss", ("train/loss", "val/loss"), True, False),
    ("Skill beyond each distance alone (values above −½)", ("train/skill_edge", "val/skill_edge"), False, False),
    ("Skill over the noisy edges (values above −½)", ("train/skill", "val/skill"), False, False),
    ("Gradient norm, and actions of the guard", ("guard/norm",), True, True),
    ("Directed edges per second", ("perf/edges_s",), False, False),
)
LOWEST: Final = {"skill": -0.5, "skill_edge": -0.5}  # the first steps are far below, and would flatten the rest
MORE: Final = """
.chart svg, .parity svg { width: 100%; height: auto; display: block }
.chart text, .parity text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.chart .y, .chart .x2 { text-anchor: end } .chart .x0 { text-anchor: start } .chart .x1 { text-anchor: middle }
.parity text { text-anchor: start }
@media (max-width: 560px) { .chart text { font-size: 20px } }
.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.l0 { stroke: var(--bar) } .l1 { stroke: var(--s1) } .grid { stroke: var(--line); stroke-width: 1; fill: none }
.mark { stroke: #c33; stroke-dasharray: 3 3 } .parity circle { fill: var(--bar); opacity: .55 }
.chart output { display: block; min-height: 1.5em; font-variant-numeric: tabular-nums; font-size: .9rem }
.chart { margin-bottom: 26px; break-inside: avoid } pre { overflow-x: auto; font-size: .85rem }
.scroll + .scroll, .scroll + .chart { margin-top: 24px }
.chart figcaption span { white-space: nowrap; margin-left: 8px }
.parities { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 16px }
@media print {
  body { font-size: 11pt } main { max-width: none; padding: 0 } h2 { break-after: avoid }
  .parity, tr, dl div { break-inside: avoid } .scroll, pre { overflow: visible } pre, .t { white-space: pre-wrap }
  .chart output { display: none } .dot, dl div { print-color-adjust: exact }
}
"""
SCRIPT: Final = """
"use strict";
for (const figure of document.querySelectorAll(".chart")) {
  const lines = JSON.parse(figure.querySelector("script").textContent), svg = figure.querySelector("svg");
  const out = figure.querySelector("output");
  const tell = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    out.textContent = Object.entries(lines).map(([name, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      return `${name} ${Number(near[2].toPrecision(4))} at ${figure.dataset.unit} ${near[1]}`;
    }).join("   ");
  };
  svg.addEventListener("pointermove", tell);
  svg.addEventListener("pointerdown", tell);
}
"""


def run_page(
    name: str,
    status: Mapping[str, Any],
    card: Mapping[str, Any],
    config: str,
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    tuned: Sequence[Tuned] = (),
    drawn: CrystalMap | None = None,
) -> str:
    """The page of a pretraining run.

    Args:
        name: name of the run.
        status, card, config: contents of ``status.json``, ``encoder.json`` and ``config.yaml``, empty where missing.
        metrics, events: lines of ``metrics.jsonl`` and ``events.jsonl``.
        tuned: results, columns of predictions, and lines of the history of each fine-tuning.
        drawn: a map of crystals by the encoder.
    """
    events = [_placed(event, metrics) for event in events]
    last = {k: v for line in metrics for k, v in line.items() if isinstance(v, (int, float))}
    tiles: dict[str, str] = {
        "state": str(status.get("state", "?")),
        "step": f"{last['step']:,.0f} of {status.get('steps', '?')}",
        **{k: f"{last[k]:.4g}" for k in ("val/loss", "val/skill", "val/skill_edge") if k in last},
        "events": f"{len(events):,}",
    }
    charts = [_chart(title, names, log, metrics, events if marked else ()) for title, names, log, marked in CHARTS]
    parts = [_section("How it went", "".join(charts))]
    if events:
        rows = [[str(e["step"]), str(e.get("event", "")), _rest(e)] for e in events[:200]]
        parts.append(_section("Events", _table(["step", "event", "more"], rows)))
    parts += [_section(_title(one[0]), _tuned(one)) for one in tuned]
    parts += [_map(drawn)] if drawn else []
    if card:
        digests = [[k, str(card[k])] for k in ("data_digest", "config_digest", "weights_sha256") if k in card]
        parts.append(_section("Data", _sources(card) + _table(["", ""], digests)))
    if config:
        parts.append(
            _section("Configuration", f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
        )
    return _page(name, "A pretraining run", tiles, parts, drawn)


def tuning_page(name: str, tuned: Tuned, drawn: CrystalMap | None = None) -> str:
    """The page of a fine-tuning; for the arguments see ``run_page``."""
    results = tuned[0]
    errors, task, settings = results["errors"], results["task"], results.get("settings", {})
    metrics = ["log_loss"] if task["classes"] else [target["name"] for target in task["targets"]]
    found = [(own[m], arm, i) for i, m in enumerate(metrics) for arm, own in errors.items() if _finite(own[m])]
    best = min((each for each in found if each[2] == found[0][2]), default=(math.nan, "none: no test label", 0))
    metric = metrics[best[2]]
    sizes = results.get("crystals", [])
    tiles = {
        "best model" if len(task["targets"]) == 1 else f"best for {metric}": best[1],
        "its error": f"{best[0]:.4g} {'' if task['classes'] else task['targets'][best[2]]['unit']}",
        **({"crystals, train / val / test": " / ".join(f"{n:,}" for n in sizes[0].values())} if sizes else {}),
        **({"folds": str(len(sizes))} if len(sizes) > 1 else {}),
        "networks": str(settings.get("members", 1)),
    }
    parts = [_section("Test crystals", _tuned(tuned))]
    parts += [_map(drawn)] if drawn else []
    encoder = {"encoder": "ref", "weights of the encoder, SHA-256": "weights_sha256", "data of it": "data_digest"}
    origin = [[said, str(results["encoder"].get(key, ""))] for said, key in encoder.items()]
    origin.append(["labels, crystals and split", str(results.get("data_digest", ""))])
    parts.append(_section("Data", _sources(results) + _table(["", ""], origin)))
    listed = _table(["setting", ""], [[k, str(v)] for k, v in settings.items()])
    parts.append(_section("Settings", f"<details><summary>all</summary>{listed}</details>"))
    return _page(name, _title(results), tiles, parts, drawn)


def _page(name: str, about: str, tiles: Mapping[str, str], parts: Sequence[str], drawn: CrystalMap | None) -> str:
    dl = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(key)}</dt></div>" for key, value in tiles.items())
    script = SCRIPT + (MAP_SCRIPT.replace('"use strict";', "") if drawn else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(name)}: {escape(about)}</title><style>{STYLE}{MORE}{MAP_STYLE if drawn else ''}</style></head>"
        f"<body><main><h1>{escape(name)}</h1><p class='sub'>{escape(about)}</p><dl>{dl}</dl>{''.join(parts)}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def _map(drawn: CrystalMap) -> str:
    return _section(f"Map of {drawn.name}", section(drawn))


def _sources(card: Mapping[str, Any]) -> str:
    rows = [[str(s.get(k, "")) for k in ("name", "licence", "cite")] for s in card.get("sources", [])]
    return _table(["source", "licence", "to cite"], rows)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text, and are escaped."""
    top = "".join(f'<th class="t">{escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f'<td class="t">{escape(c)}</td>' for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _placed(event: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Give an event without a step, such as the death of a worker, the last step that was logged before it."""
    if event.get("step") is not None:
        return event
    before = [line["step"] for line in metrics if line["time"] <= event["time"]]
    return {**event, "step": before[-1] if before else 0}


def _rest(event: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in event.items() if k not in ("step", "time", "event")})


def _chart(
    title: str,
    names: Sequence[str],
    logarithmic: bool,
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]] = (),
    unit: str = "step",
) -> str:
    """A chart of metrics over steps, with marks for events; empty if no metric was recorded."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        found = [(float(m["step"]), float(m[name])) for m in metrics if isinstance(m.get(name), (int, float))]
        least = 0.0 if logarithmic else LOWEST.get(name.rpartition("/")[2], -math.inf)
        found = [(s, v) for s, v in found if math.isfinite(v) and v > least]
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
    for i, share in enumerate((0.0, 0.5, 1.0)):
        value, step = low + share * tall, first + share * wide
        shown = 10**value if logarithmic else value
        drawn.append(f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - 10}"/>')
        drawn.append(f'<text class="y" x="{LEFT - 6}" y="{up(value) + 4:.1f}">{_tick(shown)}</text>')
        drawn.append(f'<text class="x{i}" x="{across(step):.1f}" y="{FLOOR + 24}">{step:,.0f}</text>')
    for event in events:
        x = across(min(max(float(event["step"]), first), last))
        told = escape(f"{event.get('event')} at step {event.get('step')}")
        drawn.append(f'<path class="mark" d="M{x:.1f} {ROOF}V{FLOOR}"><title>{told}</title></path>')
    where: dict[str, list[list[float]]] = {}
    for i, (name, points) in enumerate(series.items()):
        where[name] = [[round(across(s), 1), s, v] for s, v in points]
        line = "L".join(f"{across(s):.1f} {up(scale(v)):.1f}" for s, v in points)
        drawn.append(f'<path class="l{i}" d="M{line}"/>')
    legend = " ".join(f'<span><i class="dot s{i}"></i>{escape(name)}</span>' for i, name in enumerate(series))
    return (
        f'<figure class="chart" data-unit="{unit}"><figcaption><b>{escape(title)}</b> {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over {unit}s">'
        f"{''.join(drawn)}</svg>"
        f'<output></output><script type="application/json">{in_script(where)}</script></figure>'
    )


def _title(results: Mapping[str, Any]) -> str:
    return "Fine-tuned: " + ", ".join(t["name"] for t in results["task"]["targets"])


def _tuned(tuned: Tuned) -> str:
    """A fine-tuning: errors, coverage of the uncertainty, learning curves, and parity plots."""
    results, rows, history = tuned
    errors, task = results["errors"], results["task"]
    names = list(next(iter(errors.values())))
    units = {t["name"]: t["unit"] for t in task["targets"]}
    head = ["", *(f"{n}, {units[n]}" if units.get(n) else n for n in names)]
    table = _table(head, [[arm, *(_number(own[n]) for n in names)] for arm, own in errors.items()])
    plots = []
    for target in [] if task["classes"] else task["targets"]:
        for arm in ("pretrained", "from scratch"):
            if (column := f"{arm}:{target['name']}") in rows:
                pairs = zip(rows[f"true:{target['name']}"], rows[column], strict=True)
                plots.append(_parity(f"{arm}: {target['name']}, {target['unit']}", [p for p in pairs if _finite(*p)]))
    about = f"<p class='note'>fine-tuned from {escape(str(results['encoder']['ref']))}; errors on the test crystals</p>"
    worth = [
        [name, *(_number(u[k]) for k in ("factor", "covered", "uncalibrated", "rank"))]
        for name, u in results.get("uncertainty", {}).items()
    ]
    head = [
        "uncertainty",
        "factor of the deviation",
        "coverage (target 0.68)",
        "coverage of one deviation",
        "rank correlation",
    ]
    unit = next(iter(units.values())) if len(units) == 1 and not task["classes"] else ""
    learned = _chart(f"Lowest validation error so far{', ' + unit if unit else ''}", *_learning(history), unit="epoch")
    return (
        about
        + table
        + (_table(head, worth) if worth else "")
        + learned
        + f"<div class='parities'>{''.join(plots)}</div>"
    )


def _learning(history: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool, list[dict[str, float]]]:
    """Arms, whether the axis is logarithmic, and by epoch the lowest validation error so far, mean over networks.

    A network that has stopped keeps its lowest error.
    """
    best: dict[str, dict[int, dict[int, float]]] = {}  # arm → network → epoch
    for line in history:
        if _finite(line.get("val")):
            own = best.setdefault(str(line["arm"]), {}).setdefault(int(line["member"]), {})
            own[int(line["epoch"])] = min(line["val"], *own.values(), math.inf)
    last = max((e for arm in best.values() for own in arm.values() for e in own), default=-1)
    lines: list[dict[str, float]] = []
    for epoch in range(last + 1):
        line = {"step": float(epoch)}
        for arm, networks in best.items():
            known = [[v for e, v in own.items() if e <= epoch] for own in networks.values()]
            if all(known):
                line[arm] = sum(min(values) for values in known) / len(known)
        lines.append(line)
    return list(best), True, lines


def _tick(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if _finite(value) else "–"


def _finite(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _parity(title: str, pairs: Sequence[tuple[float, float]]) -> str:
    """A parity plot: true values on x, predicted ones on y, on the same scale."""
    if not pairs:
        return ""
    pairs = pairs[:: max(1, math.ceil(len(pairs) / 1500))]
    low, high = min(min(p) for p in pairs), max(max(p) for p in pairs)
    unit = 250 / ((high - low) or 1.0)
    dots = "".join(
        f'<circle cx="{30 + (t - low) * unit:.1f}" cy="{270 - (p - low) * unit:.1f}" r="3"/>' for t, p in pairs
    )
    return (
        f'<figure class="parity"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 300 300" role="img" '
        f'aria-label="predicted against true"><path class="grid" d="M30 270L280 20M30 20V270H280"/>{dots}'
        f'<text x="30" y="288">true, {low:.3g} to {high:.3g} on both axes</text>'
        '<text x="18" y="270" transform="rotate(-90 18 270)">predicted</text></svg></figure>'
    )
