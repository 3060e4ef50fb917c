# SPDX-License-Identifier: Apache-2.0
"""Loss by source of the training rows, and by held-out set."""

import re
from typing import Any

import numpy as np

from moejax.report.charts import (
  Chart,
  last_mean,
  legend,
  mark_phases,
  number,
  step_axes,
)
from moejax.report.rundata import RunData, Table
from moejax.report.series import finite, smooth
from moejax.report.style import LIGHT, short_name

COLOURS = tuple(LIGHT[name] for name in ("blue", "orange", "green", "purple"))
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
# As many as can be told apart; the log has all.
MOST = len(COLOURS) * len(DASHES)
MANY_NAMES = (560, 300), (348, 300)  # sizes, wide and narrow


def sources_chart(run: RunData) -> Chart | None:
  """Training loss of each source of a mixture."""
  names = _names(run.metrics, r"sources/(.+)/xent")
  if len(names) < 2:
    return None
  ends = {
    name: last_mean(run.metrics.steps, run.metrics[key])
    for name, key in names.items()
  }
  low, high = min(ends, key=ends.get), max(ends, key=ends.get)
  title = (
    f"Training loss {ends[low]:.2f} on {short_name(low)}, {ends[high]:.2f} on "
    f"{short_name(high)}"
  )
  note = "Nats per token of each source's rows, running mean over steps."
  return _chart(run, "sources", title, note, run.metrics, names, smoothed=True)


def held_out_chart(run: RunData) -> Chart | None:
  """Bits per byte of each held-out set, and of the validation rows by source.

  Bytes, not tokens: sets differ in how many bytes a token has.
  """
  table = run.evaluations
  names = _names(table, r"validation/(?:sources/)?(.+)/bits_per_byte")
  if not names:
    return None
  ends = {name: _last(table, key) for name, key in names.items()}
  low, high = min(ends, key=ends.get), max(ends, key=ends.get)
  title = f"Held-out text: {ends[low]:.2f} bits per byte on {short_name(low)}"
  if low != high:
    title += f", {ends[high]:.2f} on {short_name(high)}"
  note = "Bits per byte of each held-out set, by step."
  return _chart(run, "held_out", title, note, table, names, smoothed=False)


def tasks_chart(run: RunData) -> Chart | None:
  """Numbers of the tasks that are evaluated in training."""
  tasks = [] if run.config is None else run.config.eval.sets
  starts = tuple(f"validation/{task.name}/" for task in tasks if task.task)
  names = {
    key.removeprefix("validation/"): key
    for key in run.evaluations.columns
    if starts and key.startswith(starts)
    and np.isfinite(run.evaluations[key]).any()
  }  # fmt: skip
  if not names:
    return None
  first, key = next(iter(names.items()))
  title = f"Tasks: {short_name(first)} {number(_last(run.evaluations, key))}"
  if len(names) > 1:
    title += f", and {len(names) - 1} more"
  note = "What each task returns, by step, in its own units."
  table = run.evaluations
  return _chart(run, "tasks", title, note, table, names, smoothed=False)


def _names(table: Table, pattern: str) -> dict[str, str]:
  """The keys of a table that match, by the name in them."""
  found = {
    match[1]: key
    for key in table.columns
    if (match := re.fullmatch(pattern, key)) is not None
  }
  return {n: k for n, k in found.items() if np.isfinite(table[k]).any()}


def _last(table: Table, key: str) -> float:
  _, y = finite(table.steps, table[key])
  return float(y[-1])


def _chart(
  run: RunData, name: str, title: str, note: str, table: Table,
  names: dict[str, str], smoothed: bool,
) -> Chart:  # fmt: skip
  shown = list(names.items())[:MOST]
  if len(names) > MOST:
    note += f" The first {MOST} of {len(names)}."

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    for place, (label, key) in enumerate(shown):
      turn, colour = divmod(place, len(COLOURS))
      x, y = (smooth if smoothed else finite)(table.steps, table[key])
      ax.plot(
        x, y, color=COLOURS[colour], linestyle=DASHES[turn], linewidth=1.8,
        label=short_name(label), marker="" if smoothed or len(x) > 30 else "o",
        markersize=4.5, clip_on=False,
      )  # fmt: skip
    mark_phases(ax, run.config, run.last_step)
    legend(ax, columns=1 if narrow else 2)

  if len(shown) <= 4:
    return Chart(name, title, note, draw)
  return Chart(name, title, note, draw, *MANY_NAMES)
