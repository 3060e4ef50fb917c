# SPDX-License-Identifier: Apache-2.0
"""The HTML page: one file, no network, everything from outside escaped."""

import html
import unicodedata

import numpy as np

from moejax.metrics import SKIPPED
from moejax.report import headline, skipped
from moejax.report.charts import HERO, Chart, percent
from moejax.report.rundata import RunData
from moejax.report.sheet import style_sheet
from moejax.report.style import new_figure, plot_style, to_svg

MAX_SAMPLES = 12
MAX_EVALUATIONS = 40
MAX_SAMPLE_CHARACTERS = 4000


def render(run: RunData, sections: dict[str, list[Chart]]) -> str:
  """The whole page.

  Args:
    run: the run.
    sections: charts by the heading they stand under; empty ones are left out.
  """
  word, sentence = headline.status(run)
  facts = "".join(
    f"<span>{escape(fact)}</span>" for fact in headline.facts(run)
  )
  body = [
    f'<div class="head"><h1>{escape(run.name)}</h1>'
    f'<span class="status {word.replace(" ", "-")}">{word}</span></div>',
    f'<p class="facts"><span>{escape(sentence)}</span>{facts}</p>',
    _tiles(run),
  ]
  for heading, charts in sections.items():
    if charts:
      body.append(f"<h2>{escape(heading)}</h2>" if heading else "")
      body.append(_dropped_note(run) if heading == "Routing" else "")
      cards = "".join(card(chart) for chart in charts)
      body.append(f'<div class="cards">{cards}</div>')
  body += [_samples(run), _details(run)]
  footer = (
    "Written by <code>moejax report</code> from the logs in the run's folder."
  )
  return document(f"{run.name}: {word}", body, footer)


def document(title: str, body: list[str], footer: str, extra: str = "") -> str:
  """A whole page that needs no network.

  Args:
    title: text.
    body: parts in HTML; empty ones are left out.
    footer: HTML.
    extra: further HTML for the head, such as styles.
  """
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(title)}</title>\n<style>{style_sheet()}</style>{extra}\n"
    f"</head>\n<body>\n<main>\n{chr(10).join(part for part in body if part)}\n"
    f"<footer>{footer}</footer>\n</main>\n</body>\n</html>\n"
  )


def escape(text: str) -> str:
  """Text for HTML; what UTF-8 cannot hold becomes U+FFFD."""
  text = text.encode("utf-8", "replace").decode("utf-8")
  return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
  """Control and direction-changing characters as `⟨1b⟩` or `⟨202e⟩`.

  A model may write anything; none of it may hide or reorder other text.
  """
  return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
  if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"):
    return c
  return f"⟨{ord(c):02x}⟩"


def _tiles(run: RunData) -> str:
  cells = [
    f'<div class="tile"><div class="label">{escape(tile.label)}</div>'
    f'<div class="value">{escape(tile.value)}</div>'
    f'<div class="detail">{escape(tile.detail)}</div></div>'
    for tile in headline.tiles(run)
  ]
  columns = f"--tiles: {len(cells)}"
  return f'<div class="tiles" style="{columns}">{"".join(cells)}</div>'


def card(chart: Chart) -> str:
  """A chart under its title and note."""
  kind = "hero" if chart.size == HERO else "full" if chart.size[0] > 800 else ""
  pictures = _svg(chart, narrow=False)
  if chart.narrow_size is not None:
    pictures = f'<div class="wide">{pictures}</div>' + (
      f'<div class="narrow">{_svg(chart, narrow=True)}</div>'
    )
  return (
    f'<section class="card {kind}" id="{escape(chart.name)}">'
    f'<h3>{escape(chart.title)}</h3><p class="note">{escape(chart.note)}</p>'
    f"{pictures}</section>"
  )


def _svg(chart: Chart, narrow: bool) -> str:
  size = chart.narrow_size if narrow else chart.size
  assert size is not None
  name = f"{chart.name}-narrow" if narrow else chart.name
  with plot_style():
    figure = new_figure(*size)
    chart.draw(figure, narrow)
    return to_svg(figure, name, f"{chart.title}. {chart.note}")


def _dropped_note(run: RunData) -> str:
  """Nothing dropped, or how much: what a curve at zero would hide."""
  if "router/dropped" not in run.metrics:
    return ""
  dropped = run.metrics["router/dropped"]
  steps = int((dropped > 0).sum())
  text = "No assignment was dropped in any step."
  if steps:
    text = (
      f"Assignments were dropped in {steps:,} steps, {percent(dropped.max())} "
      "of them at most."
    )
  return f'<p class="lead">{text}</p>'


def _samples(run: RunData) -> str:
  """What the model wrote, newest first."""
  if not run.samples:
    return ""
  rows = run.samples[::-1][:MAX_SAMPLES]
  first, *older = [
    f'<div class="sample"><div class="step">step {row["step"]:,}</div><pre>'
    f'<span class="prompt">{escape(_short(row["prompt"]))}</span>'
    f"{escape(_short(row['text']))}</pre></div>"
    for row in rows
  ]
  more = ""
  if older:
    more = (
      f"<details><summary>{len(older)} earlier samples"
      f"</summary>{''.join(older)}</details>"
    )
  return (
    "<h2>What the model writes</h2>"
    f'<section class="card">{first}</section>{more}'
  )


def _short(text: str) -> str:
  if len(text) <= MAX_SAMPLE_CHARACTERS:
    return text
  return text[:MAX_SAMPLE_CHARACTERS] + " …"


def _details(run: RunData) -> str:
  options = headline.options(run)
  changed = sum(row[3] for row in options)
  rows = "".join(
    f"<tr{' class=changed' if is_changed else ''}><td><code>{escape(path)}"
    f'</code></td><td><code class="value">{escape(value)}</code></td>'
    f'<td class="doc">{escape(doc)}</td></tr>'
    for path, value, doc, is_changed in options
  )
  note = f"{len(options)} options, {changed} not at their default (in colour)"
  config = folded_table("Config", note, rows)
  commit = run.record["git_commit"] or "not in a git checkout"
  versions = {**run.record["versions"], "git commit": commit}
  rows = "".join(
    f"<tr><td>{escape(str(name))}</td><td><code>{escape(str(version))}</code>"
    "</td></tr>"
    for name, version in versions.items()
  )
  packages = folded_table("Versions", "", rows)
  return f"<h2>Details</h2>{_evaluations(run)}{_skipped(run)}{config}{packages}"


def _skipped(run: RunData) -> str:
  """Which steps were not taken, why, and of which rows they were."""
  found = skipped.table(run)
  if not found:
    return ""
  rows = '<tr><th class="number">step</th><th>reason</th><th>rows</th></tr>'
  for step, reason, said in found:
    rows += f'<tr><td class="number">{step}</td><td>{escape(reason)}</td>'
    rows += f'<td class="doc">{escape(said)}</td></tr>'
  note = f"{len(run.skipped):,}; all rows are in {SKIPPED}"
  if len(found) < len(run.skipped):
    note = f"the first {len(found)} of {note}"
  return folded_table("Skipped steps", note, rows)


def _evaluations(run: RunData) -> str:
  table = run.evaluations
  keys = (
    "validation/xent",
    "validation/perplexity",
    "validation/bits_per_byte",
  )
  known = [key for key in keys if key in table]
  if not known:
    return ""
  # Lines of held-out sets alone have none of these; their chart does.
  validated = np.ones(len(table), bool)
  if "validation/tokens" in table:
    validated = np.isfinite(table["validation/tokens"])
  lines = np.flatnonzero(validated)
  cells = "".join(f'<th class="number">{escape(key)}</th>' for key in known)
  rows = f'<tr><th class="number">step</th>{cells}</tr>'
  for i in lines[::-1][:MAX_EVALUATIONS]:
    said = [
      f"{x:.4f}" if np.isfinite(x := table[key][i]) else "not finite"
      for key in known
    ]
    cells = "".join(f'<td class="number">{text}</td>' for text in said)
    rows += f'<tr><td class="number">{table.steps[i]:,}</td>{cells}</tr>'
  count = f"{len(lines)}" if len(lines) != 1 else "one"
  return folded_table("Evaluations", f"{count}, newest first", rows)


def folded_table(title: str, note: str, rows: str) -> str:
  """Rows of HTML that open on a click."""
  small = f"<small>{escape(note)}</small>" if note else ""
  return (
    f"<details><summary>{escape(title)}{small}</summary>"
    f'<div class="scroll"><table>{rows}</table></div></details>'
  )
