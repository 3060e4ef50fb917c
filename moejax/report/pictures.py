# SPDX-License-Identifier: Apache-2.0
"""The same pictures as PNG files, each with its title, and one overview."""

import textwrap
from pathlib import Path
from typing import Any

from moejax.report import headline
from moejax.report.charts import Chart
from moejax.report.rundata import RunData
from moejax.report.style import LIGHT, PIXELS_PER_INCH, new_figure, plot_style

RESOLUTION = 2  # PNG pixels per CSS pixel
MARGIN = 16


def save_png(chart: Chart, path: Path) -> None:
  """Writes one chart with its title and note above it."""
  width, height = chart.size
  header = _header_height(chart, width)
  with plot_style():
    figure = new_figure(width + 2 * MARGIN, height + header + 2 * MARGIN)
    _draw_card(figure, chart, header, width)
    _save(figure, path)


def save_overview(run: RunData, charts: list[Chart], path: Path) -> None:
  """Headline numbers and the main charts in one picture, for a README.

  Args:
    run: the run.
    charts: up to three small ones for the lower row, after the loss and, last,
      the expert load, as far as they exist.
    path: the PNG.
  """
  by_name = {chart.name: chart for chart in charts}
  top = [by_name[n] for n in ("loss",) if n in by_name]
  small = [
    by_name[n]
    for n in ("learning_rate", "throughput", "balance_loss", "busiest_expert",
              "gradient_norm", "time")
    if n in by_name
  ]  # fmt: skip
  side, bottom = small[:2], [by_name[n] for n in ("expert_load",) if n in by_name]
  width, tile_height, row = 1180, 118, 560
  load_height = 0
  if bottom:
    load_height = bottom[0].size[1] + _header_height(bottom[0], 1140) + 24
  height = tile_height + row + load_height + 16
  with plot_style():
    figure = new_figure(width, height)
    parts = figure.subfigures(
      2 + len(bottom), 1, height_ratios=[tile_height, row, *[load_height] * len(bottom)]
    )
    _draw_tiles(parts[0], run)
    left, right = parts[1].subfigures(1, 2, width_ratios=[2.05, 1])
    if top:
      _draw_card(left, top[0], 62, 760)
    for part, chart in zip(right.subfigures(2, 1), side):
      _draw_card(part, chart, 66, 340)
    if bottom:
      _draw_card(parts[2], bottom[0], 60, 1140)
    _save(figure, path)


def _draw_card(figure: Any, chart: Chart, header: int, width: int) -> None:
  height = figure.bbox.height / figure.dpi * PIXELS_PER_INCH
  head, body = figure.subfigures(2, 1, height_ratios=[header, height - header])
  inset = MARGIN / (width + 2 * MARGIN)
  title, note = _wrap(chart, width)
  head.text(inset, 1.0 - 10 / header, title, ha="left", va="top", fontsize=13.5,
            fontweight="bold", linespacing=1.2)  # fmt: skip
  lines = title.count("\n") + 1
  head.text(inset, 1.0 - (12 + 18 * lines) / header, note, ha="left", va="top",
            fontsize=10.5, color=LIGHT["soft"], linespacing=1.3)  # fmt: skip
  chart.draw(body, False)


def _wrap(chart: Chart, width: int) -> tuple[str, str]:
  # Mean widths of a character of the two font sizes, in pixels.
  title = textwrap.fill(chart.title, max(20, int(width / 7.6)))
  return title, textwrap.fill(chart.note, max(20, int(width / 5.3)))


def _header_height(chart: Chart, width: int) -> int:
  title, note = _wrap(chart, width)
  return 18 + 18 * (title.count("\n") + 1) + 15 * (note.count("\n") + 1)


def _draw_tiles(figure: Any, run: RunData) -> None:
  word, sentence = headline.status(run)
  inset = MARGIN / 1180
  figure.text(inset, 0.93, run.name, ha="left", va="top", fontsize=20,
              fontweight="bold")  # fmt: skip
  figure.text(1 - inset, 0.9, " · ".join([f"{word}: {sentence}"]), ha="right",
              va="top", fontsize=11, color=LIGHT["soft"])  # fmt: skip
  tiles = headline.tiles(run)
  for i, tile in enumerate(tiles):
    x = inset + i * (1 - 2 * inset) / len(tiles)
    figure.text(x, 0.52, tile.label, ha="left", va="top", fontsize=10.5,
                color=LIGHT["soft"])  # fmt: skip
    figure.text(x, 0.36, tile.value, ha="left", va="top", fontsize=19,
                fontweight="bold")  # fmt: skip


def _save(figure: Any, path: Path) -> None:
  """Writes the PNG whole or not at all."""
  temporary = path.with_suffix(".png.tmp")
  figure.savefig(
    temporary, format="png", dpi=RESOLUTION * PIXELS_PER_INCH,
    facecolor=LIGHT["card"],
  )  # fmt: skip
  temporary.replace(path)
