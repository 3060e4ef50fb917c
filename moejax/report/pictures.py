# SPDX-License-Identifier: Apache-2.0
"""The same pictures as PNG files, each with its title, and one overview."""

import textwrap
from pathlib import Path
from typing import Any

from moejax.report import headline
from moejax.report.charts import Chart
from moejax.report.rundata import RunData
from moejax.report.style import (
  LIGHT,
  PIXELS_PER_INCH,
  new_figure,
  plot_style,
  short_name,
)

RESOLUTION = 2  # PNG pixels per CSS pixel
MARGIN = 20
OVERVIEW_WIDTH = 1180
TILES_HEIGHT = 122
ROW_HEIGHT = 570
# What stands beside the loss, the first two of these that the run has.
BESIDE_LOSS = (
  "learning_rate", "throughput", "load_spread", "gradient_norm", "time"
)  # fmt: skip


def save_png(chart: Chart, path: Path) -> None:
  """Writes one chart with its title and note above it."""
  with plot_style():
    _save(figure_of(chart), path)


def figure_of(chart: Chart) -> Any:
  """A matplotlib figure of the chart with its title and note above it."""
  width, height = chart.size
  total = height + _header_height(chart, width) + MARGIN
  with plot_style():
    figure = new_figure(width + 2 * MARGIN, total)
    figure.set_facecolor(LIGHT["card"])  # also in a dark notebook
    _draw_card(figure, chart)
  return figure


def save_overview(run: RunData, charts: list[Chart], path: Path) -> None:
  """Headline numbers, loss, two small charts and expert loads, for a README."""
  by_name = {chart.name: chart for chart in charts}
  heights = [TILES_HEIGHT, ROW_HEIGHT]
  load_map = by_name["expert_load"] if "expert_load" in by_name else None
  if load_map is not None:
    heights.append(load_map.size[1] + _header_height(load_map, 1140) + MARGIN)
  with plot_style():
    figure = new_figure(OVERVIEW_WIDTH, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_tiles(parts[0], run)
    left, right = parts[1].subfigures(1, 2, width_ratios=[2, 1])
    if "loss" in by_name:
      _draw_card(left, by_name["loss"])
    beside = [by_name[name] for name in BESIDE_LOSS if name in by_name][:2]
    for part, chart in zip(right.subfigures(2, 1), beside):
      _draw_card(part, chart)
    if load_map is not None:
      _draw_card(parts[2], load_map)
    _save(figure, path)


def _draw_card(figure: Any, chart: Chart) -> None:
  """Title, note and picture with a margin all round."""
  width = figure.bbox.width / figure.dpi * PIXELS_PER_INCH
  height = figure.bbox.height / figure.dpi * PIXELS_PER_INCH
  inner = width - 2 * MARGIN
  header = _header_height(chart, inner)
  rows = figure.subfigures(
    3, 1, height_ratios=[header, height - header - MARGIN, MARGIN]
  )
  title, note = _wrap(chart, inner)
  left = MARGIN / width
  lines = title.count("\n") + 1
  rows[0].text(left, 1 - 14 / header, title, ha="left", va="top",
               fontsize=13.5, fontweight="bold", linespacing=1.2)  # fmt: skip
  rows[0].text(left, 1 - (17 + 18 * lines) / header, note, ha="left", va="top",
               fontsize=10.5, color=LIGHT["soft"], linespacing=1.3)  # fmt: skip
  _, body, _ = rows[1].subfigures(1, 3, width_ratios=[MARGIN, inner, MARGIN])
  chart.draw(body, False)


def _wrap(chart: Chart, width: float) -> tuple[str, str]:
  # Mean widths of a character of the two font sizes, in pixels.
  title = textwrap.fill(chart.title, max(20, int(width / 7.1)))
  return title, textwrap.fill(chart.note, max(20, int(width / 5.3)))


def _header_height(chart: Chart, width: float) -> int:
  title, note = _wrap(chart, width)
  return 26 + 18 * (title.count("\n") + 1) + 15 * (note.count("\n") + 1)


def _draw_tiles(figure: Any, run: RunData) -> None:
  word, sentence = headline.status(run)
  left = MARGIN / OVERVIEW_WIDTH
  figure.text(left, 0.86, short_name(run.name, 60), ha="left", va="top",
              fontsize=20, fontweight="bold")  # fmt: skip
  figure.text(1 - left, 0.82, f"{word}: {sentence}", ha="right", va="top",
              fontsize=11, color=LIGHT["soft"])  # fmt: skip
  tiles = headline.tiles(run)
  for i, tile in enumerate(tiles):
    x = left + i * (1 - 2 * left) / len(tiles)
    figure.text(x, 0.46, tile.label, ha="left", va="top", fontsize=10.5,
                color=LIGHT["soft"])  # fmt: skip
    figure.text(x, 0.31, tile.value, ha="left", va="top", fontsize=19,
                fontweight="bold")  # fmt: skip


def _save(figure: Any, path: Path) -> None:
  """Writes the PNG whole or not at all."""
  temporary = path.with_suffix(".png.tmp")
  figure.savefig(
    temporary, format="png", dpi=RESOLUTION * PIXELS_PER_INCH,
    facecolor=LIGHT["card"],
  )  # fmt: skip
  temporary.replace(path)
