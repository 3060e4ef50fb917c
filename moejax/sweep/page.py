# SPDX-License-Identifier: Apache-2.0
"""The comparison as one HTML file: no network, sorts by a click."""

import math
from collections.abc import Callable
from pathlib import Path

from moejax.config import phases_of
from moejax.errors import UserError
from moejax.files import write_atomically
from moejax.progress import format_count, format_seconds
from moejax.report import pictures
from moejax.report.page import card, document, escape
from moejax.sweep.charts import COLOURS, make_charts
from moejax.sweep.compare import Comparison, PointResult
from moejax.sweep.state import DONE, how_far
from moejax.sweep.table import cell, columns, footnote, order_note

PAGE = "index.html"


def write_page(comparison: Comparison, workdir: Path) -> Path:
  """Writes index.html and its pictures as PNG files beside it.

  Raises:
    UserError: the folder cannot be written.
  """
  charts = make_charts(comparison)
  body = [
    f'<div class="head"><h1>{escape(comparison.title)}</h1></div>',
    f'<p class="facts">{_facts(comparison)}</p>',
    _table(comparison, workdir),
    f'<div class="cards">{"".join(card(chart) for chart in charts)}</div>',
    _failures(comparison, workdir),
    _options(comparison),
  ]
  footer = "Written by <code>moejax sweep</code> from the logs of its runs."
  page = document(comparison.title, body, f"{footer}{SCRIPT}", STYLES)
  try:
    write_atomically(workdir / PAGE, page)
    for chart in charts:
      pictures.save_png(chart, workdir / f"{chart.name}.png")
  except OSError as e:
    raise UserError(f"cannot write the page to {workdir}: {e}") from e
  return workdir / PAGE


def _facts(comparison: Comparison) -> str:
  runs = [run for point in comparison.points for run in point.runs]
  done = [run for run in runs if run.state.state == DONE]
  configs = [run.planned.config for run in runs]
  steps = _range([c.train.num_steps for c in configs], "{:,}".format)
  tokens = _range(
    [p.config.train.batch_size * p.config.data.seq_len
     for c in configs for p in phases_of(c)], format_count,
  )  # fmt: skip
  seeds = sorted({run.planned.seed for run in runs})
  lost = sum(len(p.runs) - len(p.losses) for p in comparison.points
             if p.diverged)  # fmt: skip
  facts = [
    f"{len(comparison.points)} points, {len(done)} of {len(runs)} runs done"
    + f", {lost} with a loss that is not finite" * (lost > 0),
    f"seeds {', '.join(map(str, seeds))}",
    f"{steps} steps of {tokens} tokens",
    f"{format_seconds(sum(run.state.seconds for run in done))} of work",
  ]
  return "".join(f"<span>{escape(fact)}</span>" for fact in facts)


def _range(values: list[int], write: Callable[[int], str]) -> str:
  low, high = min(values), max(values)
  return write(low) if low == high else f"{write(low)} to {write(high)}"


def _table(comparison: Comparison, workdir: Path) -> str:
  shown = columns(comparison)
  heads = "".join(
    f'<th class="number" title="{escape(column.explanation)}" tabindex="0">'
    f"{escape(column.heading)}</th>"
    for column in shown
  )
  rows = "".join(
    _row(comparison, shown, point, workdir) for point in comparison.ranked()
  )
  notes = "".join(
    f"<li><b>{escape(c.heading)}</b>: {escape(c.explanation)}</li>"
    for c in shown
  )
  note = escape(footnote(comparison))
  star = f'<p class="note">{note}</p>' if note else ""
  return (
    '<section class="card compared"><div class="scroll"><table id="points">'
    f'<thead><tr><th tabindex="0">point</th>{heads}<th class="number" '
    'tabindex="0">runs</th></tr></thead>'
    f"<tbody>{rows}</tbody></table></div>"
    f'<p class="note">{escape(order_note(comparison))} A click on a heading '
    "sorts otherwise, pointing at a row picks out its curves. "
    "<code>moejax report POINT/seed_N</code> draws one run, "
    "<code>moejax sweep --compare</code> "
    f"then links it here.</p>{star}"
    f"<details><summary>What the columns are</summary><ul>{notes}</ul>"
    "</details></section>"
  )


def _row(
  comparison: Comparison, shown: list, point: PointResult, workdir: Path
) -> str:
  place = [p.name for p in comparison.points].index(point.name)
  cells = ""
  for column in shown:
    value = column.value(comparison, point)
    sort = repr(value) if math.isfinite(value) else ""
    text = escape(cell(comparison, column, point))
    cells += f'<td class="number" data-sort="{sort}">{text}</td>'
  done = f"{len(point.losses)}/{len(point.runs)}"
  mark = f'<i style="background:{COLOURS[place % len(COLOURS)]}"></i>'
  links = " ".join(
    f'<a href="{escape(run.planned.name)}/report/index.html">'
    f"{run.planned.seed}</a>"
    for run in point.runs
    if (workdir / run.planned.name / "report").is_dir()
  )
  star = "*" * point.looks_ahead
  kind = ' class="reference"' if point.name == comparison.reference else ""
  return (
    f'<tr data-point="{escape(point.name)}"{kind}><td data-sort='
    f'"{escape(point.name)}">{mark}<b>{escape(point.name)}</b>{star}</td>{cells}'
    f'<td class="number" data-sort="{len(point.losses)}">{done}'
    f'<span class="links" title="reports by seed"> {links}</span></td></tr>'
  )


def _failures(comparison: Comparison, workdir: Path) -> str:
  """What failed and why; nothing if nothing did."""
  rows = "".join(
    f"<tr><td><code>{escape(run.planned.name)}</code></td>"
    f"<td>{escape(how_far(workdir, run.planned))}</td>"
    f"<td>{escape(run.state.message)}</td></tr>"
    for point in comparison.points
    for run in point.runs
    if run.state.state != DONE
  )
  if not rows:
    return ""
  return f'<h2>Not done</h2><div class="scroll"><table>{rows}</table></div>'


def _options(comparison: Comparison) -> str:
  def listed(options: dict[str, object]) -> str:
    said = (
      f"<code>{escape(f'{k} = {v!r}')}</code>" for k, v in options.items()
    )
    return "<br>".join(said) or "the config as it is"

  rows = "".join(
    f"<tr><td>{escape(name)}</td><td>{listed(options)}</td></tr>"
    for name, options in comparison.options.items()
  )
  every = f"<code>{escape(comparison.config)}</code>"
  if comparison.common:
    every += f"<br>{listed(comparison.common)}"
  rows += f"<tr><td>all</td><td>{every}</td></tr>"
  return (
    "<h2>What the points set</h2><details open><summary>Options</summary>"
    f'<div class="scroll"><table>{rows}</table></div></details>'
  )


STYLES = """<style>
.compared { padding: 6px 0 12px; margin: 22px 0 18px; }
.compared .note { margin: 8px 16px 0; }
.compared details { border: 0; margin: 0; }
.compared ul { margin: 0 16px 6px; padding-left: 18px; font-size: 13px;
  color: var(--soft); }
#points th { cursor: pointer; white-space: nowrap; user-select: none; }
#points th[aria-sort=ascending]::after { content: " ▴"; }
#points th[aria-sort=descending]::after { content: " ▾"; }
#points td { white-space: nowrap; }
#points tr.reference td { background: color-mix(in srgb, var(--grid) 45%,
  transparent); }
#points tbody tr:hover td { background: var(--grid); }
#points i { display: inline-block; width: 10px; height: 10px; margin-right: 8px;
  border-radius: 3px; }
.links a { color: var(--blue); font-size: 12px; margin-left: 3px; }
body.picking svg g.other { opacity: 0.1; }
.cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 700px) {
  .cards { grid-template-columns: minmax(0, 1fr); }
}
</style>"""

SCRIPT = """<script>
const table = document.getElementById("points");
const heads = [...table.tHead.rows[0].cells];
const sortBy = (n) => {
  const up = heads[n].getAttribute("aria-sort") !== "ascending";
  heads.forEach((h) => h.removeAttribute("aria-sort"));
  heads[n].setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.cells[n].dataset.sort;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = n ? x - y : x.localeCompare(y);
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
};
heads.forEach((h, n) => {
  h.addEventListener("click", () => sortBy(n));
  h.addEventListener("keydown", (e) => { if (e.key === "Enter") sortBy(n); });
});
const parts = [...document.querySelectorAll("svg g[id]")].filter(
  (g) => /-(curve|band|name)-/.test(g.id));
for (const row of table.tBodies[0].rows) {
  const mine = new RegExp("-(curve|band|name)-" +
    row.dataset.point.replace(/[.+]/g, "\\\\$&") + "$");
  row.addEventListener("mouseenter", () => {
    document.body.classList.add("picking");
    parts.forEach((g) => g.classList.toggle("other", !mine.test(g.id)));
  });
  row.addEventListener("mouseleave", () =>
    document.body.classList.remove("picking"));
}
</script>"""
