# SPDX-License-Identifier: Apache-2.0
"""The page's style sheet; colours come from `style.py`."""

from moejax.report.style import DARK, LIGHT


def style_sheet() -> str:
  """CSS of the whole page."""
  light = " ".join(f"--{role}: {colour};" for role, colour in LIGHT.items())
  dark = " ".join(f"--{role}: {colour};" for role, colour in DARK.items())
  return (
    f":root {{ color-scheme: light dark; --page: #f5f6f9; {light} }}\n"
    "@media (prefers-color-scheme: dark) {"
    f" :root {{ --page: #0f1319; {dark} }} }}\n{SHEET}"
  )


SHEET = """
:root {
  --font: Inter, "Helvetica Neue", Helvetica, Arial, "Liberation Sans",
    sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
    monospace;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--font); }
main { max-width: 1228px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 14px; }
h3 { font-size: 15px; line-height: 1.35; margin: 0; font-weight: 650;
  text-wrap: balance; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.status { font-size: 12.5px; font-weight: 600; padding: 2px 10px;
  border-radius: 999px; border: 1.5px solid currentColor; color: var(--blue); }
.status.finished { color: var(--green); }
.status.diverged { color: var(--orange); }
.facts { color: var(--soft); margin: 6px 0 0; }
.facts span:not(:last-child)::after { content: " · "; }
.tiles { display: grid; gap: 1px; margin: 24px 0 18px; overflow: hidden;
  grid-template-columns: repeat(var(--tiles), 1fr);
  background: var(--grid); border: 1px solid var(--grid); border-radius: 12px; }
.tile { background: var(--card); padding: 14px 14px 13px 16px; min-width: 0; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 24px; line-height: 1.25; font-weight: 600;
  letter-spacing: -0.02em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile .detail { color: var(--soft); font-size: 12px; line-height: 1.35; }
.cards { display: grid; gap: 18px;
  grid-template-columns: repeat(3, minmax(0, 1fr)); }
.card { background: var(--card); border: 1px solid var(--grid);
  border-radius: 12px; padding: 15px 16px 10px; margin: 0; min-width: 0;
  display: flex; flex-direction: column; }
.card .note { color: var(--soft); font-size: 12.5px; line-height: 1.4;
  margin: 2px 0 10px; }
.card svg { display: block; width: 100%; height: auto; margin-top: auto; }
.card svg image { image-rendering: pixelated; }
.hero { grid-column: span 2; grid-row: span 2; }
.full { grid-column: 1 / -1; }
.narrow { display: none; }
details { background: var(--card); border: 1px solid var(--grid);
  border-radius: 12px; margin: 10px 0; }
summary { cursor: pointer; padding: 11px 16px; font-weight: 600; }
summary small { color: var(--soft); font-weight: 400; font-size: 13px;
  margin-left: 6px; }
.scroll { overflow-x: auto; padding: 0 16px 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
td, th { padding: 5px 14px 5px 0; vertical-align: top;
  border-top: 1px solid var(--grid); }
tr:first-child > th { border-top: 0; }
td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px/1.5 var(--mono); overflow-wrap: anywhere; }
td.doc { color: var(--soft); }
td code { white-space: nowrap; }
td code.value { white-space: normal; display: inline-block;
  min-width: 110px; }
tr.changed code.value { color: var(--blue); font-weight: 700; }
.sample { padding: 4px 16px 12px; }
.card > .sample { padding: 0 0 6px; }
.sample .step { color: var(--soft); font-size: 12.5px; }
pre { font: 13px/1.5 var(--mono); margin: 4px 0 0; padding: 12px 14px;
  background: var(--page); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 420px;
  overflow-y: auto; }
pre .prompt { color: var(--soft); }
.lead { color: var(--soft); margin: -8px 0 14px; }
.cards + .lead { margin-top: 14px; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 40px; }
@media (max-width: 1000px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .hero { grid-row: auto; }
}
@media (max-width: 700px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 25px; }
  .cards { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .hero, .full { grid-column: auto; }
  .card { padding: 13px 13px 8px; }
  .wide { display: none; }
  .narrow { display: block; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .tile { padding: 11px 13px; }
  .tile .value { font-size: 22px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  td.doc { display: none; }
  td code { white-space: normal; }
}
@media print {
  body { background: none; }
  .card, .tiles, details { break-inside: avoid; }
}
"""
