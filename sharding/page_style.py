"""The style sheet of ``page``: light and dark, wide and narrow."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --bg: #fff; --card: #f4f6f9; --ink: #1b2430; --soft: #5b6776; --line: #dde3ea;
  --bar: #2f6fb5; --s1: #e08a2c; --s2: #5a9c6e;
  --q0: #eef1f4; --q1: #dcebf9; --q2: #bcd8f2; --q3: #93c1e8;
  --q4: #66a4db; --q5: #3a7dbd; --q6: #2166b0; --q7: #0f4587;
  --low: #16324f; --high: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #12161c; --card: #1b212a; --ink: #e6ebf1; --soft: #9aa7b5; --line: #2c3540;
    --bar: #5b9bd9; --s1: #e9a04f; --s2: #74b788;
    --q0: #1c222a; --q1: #15294a; --q2: #1a3a66; --q3: #1f4d86;
    --q4: #2a609f; --q5: #5a97d6; --q6: #86b7e8; --q7: #b9d9f6;
    --low: #e3edf8; --high: #0b1928;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 28px 16px 40px }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 0 0 12px }
section { margin-top: 40px }
figure, dl, dd { margin: 0 }
.sub, .note, dt, figcaption, .legend, footer, summary, th { color: var(--soft) }
.sub { margin: 6px 0 20px }
.note { font-size: .85rem; margin: 6px 0 0 }
footer { margin-top: 44px; font-size: .85rem; overflow-wrap: anywhere }
summary { cursor: pointer; margin-top: 12px }

dl { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(200px, 46%), 1fr)) }
dl div { background: var(--card); border-radius: 10px; padding: 12px 14px }
dd { font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums }
dt { font-size: .85rem }

.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500 }
th:first-child, td:first-child { padding-left: 0 }
.t { text-align: left }
.w { white-space: normal; display: block; min-width: 220px; overflow-wrap: anywhere }

.bar { display: flex; gap: 2px; height: 14px; margin-bottom: 8px; border-radius: 7px; overflow: hidden }
.bar i { min-width: 3px }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px }
.s0, .h { background: var(--bar) }
.s1 { background: var(--s1) }
.s2 { background: var(--s2) }
.h { display: block; height: 12px; border-radius: 3px; min-width: 2px }
.two + .scroll { margin-top: 24px }
.reasons td:nth-child(2) { width: 45% }

.two { display: grid; gap: 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
figcaption { font-size: .9rem }
figcaption b { color: var(--ink) }
svg { width: 100%; display: block; margin-top: 10px }
svg rect { fill: var(--bar) }
svg path { stroke: var(--line) }
svg text { font-size: 10.5px; text-anchor: middle; fill: var(--ink) }
svg .x { fill: var(--soft) }

.elements { display: grid; grid-template: repeat(7, auto) 10px / repeat(18, 1fr); gap: 3px }
.e { aspect-ratio: 1; border-radius: 4px; min-width: 0; color: var(--low); line-height: 1.15 }
.e { display: flex; flex-direction: column; align-items: center; justify-content: center }
.e b { font-size: clamp(9px, 1.9vw, 17px); font-weight: 600 }
.e span { font-size: 11px }
.q0 { background: var(--q0) }
.q1 { background: var(--q1) }
.q2 { background: var(--q2) }
.q3 { background: var(--q3) }
.q4 { background: var(--q4) }
.q5 { background: var(--q5) }
.q6 { background: var(--q6) }
.q7 { background: var(--q7) }
.e.q0 { color: var(--soft) }
.e.q5, .e.q6, .e.q7 { color: var(--high) }
.legend { font-size: .85rem; margin: 12px 0 }
.legend span { display: inline-block; margin-left: 12px; white-space: nowrap }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; vertical-align: -2px }
.legend i { margin-right: 5px }
@media (max-width: 760px) {
  .e span { display: none }
  .elements { gap: 2px }
  .e { border-radius: 3px }
}
"""
