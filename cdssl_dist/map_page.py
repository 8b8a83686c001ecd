"""The page of ``cdssl map``: one file, no network. What comes from data travels as JSON, and is shown as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

STYLE: Final = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b2430; --soft: #5b6776; --line: #dde3ea }
@media (prefers-color-scheme: dark) { :root { --bg: #12161c; --ink: #e6ebf1; --soft: #9aa7b5; --line: #2c3540 } }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.3rem; margin: 0 }
p { color: var(--soft); margin: .3rem 0 }
form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin: .6rem 0 }
select, input { font: inherit; max-width: 14rem }
canvas { width: 100%; aspect-ratio: 4 / 3; border: 1px solid var(--line); border-radius: 8px; touch-action: pan-y }
#scale { height: .7rem; border-radius: 4px; background: linear-gradient(90deg, #440154, #31688e, #35b779, #fde725) }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .9rem }
output { display: block; min-height: 1.5em; overflow-wrap: anywhere }
@media print { form { display: none } }
"""

SCRIPT: Final = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.querySelector("canvas"), column = document.getElementById("column");
const find = document.getElementById("find"), told = document.querySelector("output");
const stops = [[68, 1, 84], [49, 104, 142], [53, 183, 121], [253, 231, 37]];
for (const name of Object.keys(data.columns)) column.add(new Option(name, name));
const format = v => v === null ? "–" : Number(v.toPrecision(4)).toString();
const place = i => [(0.03 + 0.94 * data.x[i]) * canvas.width, (0.97 - 0.94 * data.y[i]) * canvas.height];
function color(v, low, high) {
  if (v === null) return "rgba(128,128,128,.4)";
  const t = 3 * Math.min(Math.max((v - low) / (high - low || 1), 0), 0.9999), i = Math.floor(t), f = t - i;
  return `rgb(${stops[i].map((a, j) => Math.round(a + f * (stops[i + 1][j] - a))).join()})`;
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d"), {values, low, high, kept} = data.columns[column.value];
  const radius = ratio * Math.min(4, Math.max(1.2, 160 / Math.sqrt(values.length)));
  const wanted = find.value.trim().toLowerCase();
  let hits = 0;
  for (let i = 0; i < values.length; i++) {
    const hit = !wanted || data.formulas[i].toLowerCase() === wanted || data.keys[i].toLowerCase().includes(wanted);
    hits += hit;
    const [x, y] = place(i);
    pen.globalAlpha = hit ? 0.85 : 0.08;
    pen.fillStyle = color(values[i], low, high);
    pen.beginPath(); pen.arc(x, y, wanted && hit ? 2 * radius : radius, 0, 7); pen.fill();
  }
  document.getElementById("low").textContent = format(low);
  document.getElementById("high").textContent = format(high);
  document.getElementById("kept").textContent = kept;
  document.getElementById("hits").textContent = wanted ? `${hits} found` : "";
}
canvas.addEventListener("pointermove", event => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
  let best = -1, least = (14 * scale) ** 2;
  for (let i = 0; i < data.x.length; i++) {
    const [x, y] = place(i), d = (x - px) ** 2 + (y - py) ** 2;
    if (d < least) { least = d; best = i; }
  }
  told.textContent = best < 0 ? "" : `${data.keys[best]}  ${data.formulas[best]}  ` +
    `${column.value} ${format(data.columns[column.value].values[best])}`;
});
column.addEventListener("change", draw);
find.addEventListener("input", draw);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
window.addEventListener("resize", draw);
draw();
"""


def page(
    name: str,
    method: str,
    place: NDArray[np.float64],
    keys: Sequence[str],
    formulas: Sequence[str],
    columns: Mapping[str, NDArray[np.float64]],
    kept: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        name: of the file of vectors.
        method: that made the map.
        place: (n, 2).
        keys, formulas: of the crystals.
        columns: name → (n,), the first one is shown first.
        kept: name → ``map.Kept``.
    """
    span = np.ptp(place, axis=0)
    unit = (place - place.min(axis=0)) / np.where(span > 0, span, 1.0)
    content = {
        "x": np.round(unit[:, 0], 4).tolist(),
        "y": np.round(unit[:, 1], 4).tolist(),
        "keys": list(keys),
        "formulas": list(formulas),
        "columns": {c: _column(values, kept[c]) for c, values in columns.items()},
    }
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(name)}: a map of crystals</title><style>{STYLE}</style></head><body><main>
<h1>{escape(name)}</h1>
<p>{len(keys):,} crystals, their vectors in two dimensions ({escape(method)}). <span id="kept"></span></p>
<form><label>colour <select id="column"></select></label>
<label>formula or key <input id="find" type="search"></label><span id="hits"></span></form>
<canvas role="img" aria-label="A map of crystals"></canvas>
<div id="scale"></div><div class="ends"><span id="low"></span><span id="high"></span></div><output></output>
</main><script type="application/json" id="data">{text}</script><script>{SCRIPT}</script></body></html>
"""


def _column(values: NDArray[np.float64], kept: Any) -> dict[str, Any]:
    low, high = (float(v) for v in np.nanpercentile(values, [2, 98]))
    rounded = [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]
    said = (
        f"Neighbours on the map tell {kept.column} with skill {kept.on_map:.2f} (in the vectors {kept.in_vectors:.2f})."
    )
    return {"values": rounded, "low": low, "high": high, "kept": said}
