"""The map as a page or a section of one, without network access. Data is embedded as JSON and shown as text."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.page_style import STYLE

if TYPE_CHECKING:
    from cdssl_dist.look.map import CrystalMap

MAP_STYLE: Final = """
.map form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin: .6rem 0 }
.map select, .map input { font: inherit; max-width: 14rem }
.map canvas { width: 100%; aspect-ratio: 4 / 3; border: 1px solid var(--line); border-radius: 8px; touch-action: pan-y }
#scale { height: .7rem; border-radius: 4px; background: linear-gradient(90deg, #440154, #31688e, #35b779, #fde725) }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .9rem }
.map output { display: block; min-height: 1.5em; overflow-wrap: anywhere }
@media print { .map form { display: none } .map { break-inside: avoid } #scale { print-color-adjust: exact } }
"""

MAP_SCRIPT: Final = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.querySelector("canvas"), column = document.getElementById("column");
const find = document.getElementById("find"), told = document.getElementById("told");
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


def page(found: CrystalMap) -> str:
    """A page of its own."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(found.name)}: a map of crystals</title><style>{STYLE}{MAP_STYLE}</style></head><body><main>
<h1>{escape(found.name)}</h1>{section(found)}</main><script>{MAP_SCRIPT}</script></body></html>
"""


def section(found: CrystalMap) -> str:
    """A section for a page with ``MAP_STYLE``, with ``MAP_SCRIPT`` at its end, and with no other map."""
    place = found.place
    span = np.ptp(place, axis=0)
    unit = (place - place.min(axis=0)) / np.where(span > 0, span, 1.0)
    content = {
        "x": np.round(unit[:, 0], 4).tolist(),
        "y": np.round(unit[:, 1], 4).tolist(),
        "keys": found.keys,
        "formulas": found.formulas,
        "columns": {c: _column(values, found.kept[c]) for c, values in found.columns.items()},
    }
    return f"""<div class="map"><p class="note">{len(found.keys):,} crystals, their vectors in two dimensions
({escape(found.method)}). <span id="kept"></span></p>
<form><label>colour <select id="column"></select></label>
<label>formula or key <input id="find" type="search"></label><span id="hits"></span></form>
<canvas role="img" aria-label="A map of crystals"></canvas>
<div id="scale"></div><div class="ends"><span id="low"></span><span id="high"></span></div><output id="told"></output>
<script type="application/json" id="data">{in_script(content)}</script></div>"""


def in_script(content: Any) -> str:
    """JSON that can neither close nor open an HTML element, whatever its strings hold."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _column(values: NDArray[np.float64], kept: Any) -> dict[str, Any]:
    low, high = (float(v) for v in np.nanpercentile(values, [2, 98]))
    rounded = [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]
    said = (
        f"Neighbours on the map predict {kept.column} with skill {kept.on_map:.2f} (by vectors {kept.in_vectors:.2f})."
    )
    return {"values": rounded, "low": low, "high": high, "kept": said}
