# SPDX-License-Identifier: Apache-2.0
"""What all pictures have in common: a finding, a note, axes of one kind."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.config import Config, phases_of
from moejax.progress import format_count
from moejax.report.series import finite, smooth, thin
from moejax.report.style import LIGHT, short_name

SMALL = (348, 216)
HERO = (740, 528)
FULL = 1146


@dataclasses.dataclass(frozen=True)
class Chart:
  """One picture of the report.

  Attributes:
    name: stem of the PNG's name.
    title: what the picture shows, as a finding with its number.
    note: what is drawn and in which units.
    draw: `(figure, narrow)` draws it on a figure of `size` or `narrow_size`.
    size: width and height in CSS pixels.
    narrow_size: for telephones; None if `size` fits them.
  """

  name: str
  title: str
  note: str
  draw: Callable[[Any, bool], None]
  size: tuple[int, int] = SMALL
  narrow_size: tuple[int, int] | None = None


def step_axes(figure: Any, run_steps: int, unit: str = "") -> Any:
  """Axes over steps 0..run_steps; `unit` heads the y axis."""
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  ax = figure.subplots()
  ax.set_xlim(0, run_steps)
  ax.set_xlabel("step", labelpad=2)
  if run_steps < 6:  # the locator would use fractions of a step
    ax.set_xlim(0.5, run_steps + 0.5)
    ax.set_xticks(range(1, run_steps + 1))
  else:
    ax.xaxis.set_major_locator(
      MaxNLocator(6, steps=[1, 2, 5, 10], integer=True)
    )
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_count(x)))
  ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  if unit:
    head_axis(ax, unit)
  return ax


def head_axis(ax: Any, unit: str, right: bool = False) -> None:
  """The y axis' unit, level above its top: easier to read than turned text."""
  ax.annotate(
    unit, (1.0 if right else 0.0, 1.0), (0, 7), xycoords="axes fraction",
    textcoords="offset points", ha="right" if right else "left", va="bottom",
    color=LIGHT["soft"], fontsize=10.5,
  )  # fmt: skip


def draw_noisy(
  ax: Any, x: np.ndarray, y: np.ndarray, colour: str, label: str,
  reduce: Callable = np.mean,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Raw values faint, their running mean strong; returns the latter."""
  xs, ys = smooth(x, y, reduce)
  if len(xs) == 1:
    ax.plot(xs, ys, "o", color=LIGHT[colour], label=label, clip_on=False)
    return xs, ys
  raw_x, raw_y = thin(x, y)
  alpha = 0.4 if len(raw_x) < 400 else 0.25
  ax.plot(raw_x, raw_y, color=LIGHT[colour], alpha=alpha, linewidth=0.8)
  ax.plot(xs, ys, color=LIGHT[colour], linewidth=2.0, label=label)
  return xs, ys


def reference_line(
  ax: Any, y: float, text: str, below: bool = False, left: bool = False
) -> None:
  """A dashed horizontal line with its meaning written on it."""
  ax.axhline(y, color=LIGHT["soft"], linewidth=1.0, linestyle=(0, (4, 3)))
  note_on_line(ax, y, text, below, left)


def note_on_line(
  ax: Any, y: float, text: str, below: bool = False, left: bool = False
) -> None:
  """What a line means, at the height of one of its ends."""
  ax.annotate(
    text, (0.0 if left else 1.0, y), (0, -3 if below else 3),
    xycoords=("axes fraction", "data"), textcoords="offset points",
    ha="left" if left else "right", va="top" if below else "bottom",
    color=LIGHT["soft"], fontsize=10,
    bbox={"facecolor": LIGHT["card"], "edgecolor": "none", "pad": 0.8,
          "alpha": 0.85},
  )  # fmt: skip


def mark_phases(ax: Any, config: Config | None, last_step: int) -> None:
  """A thin vertical line where each phase begins, with its name on it."""
  phases = phases_of(config) if config is not None else ()
  for phase in phases[:0] if len(phases) < 2 else phases:
    if phase.start > last_step:
      continue
    if phase.start:
      ax.axvline(phase.start, color=LIGHT["soft"], linewidth=0.8, alpha=0.7)
    ax.annotate(
      short_name(phase.name, 24), (phase.start, 0.0), (4, 5),
      xycoords=("data", "axes fraction"), textcoords="offset points",
      color=LIGHT["soft"], fontsize=9.5, rotation=90, va="bottom",
      annotation_clip=True, zorder=5,
      bbox={"facecolor": LIGHT["card"], "alpha": 0.7, "linewidth": 0,
            "pad": 0.5},
    )  # fmt: skip


def legend(ax: Any, columns: int = 3) -> None:
  """Above the axes, at the right, where no curve can be."""
  ax.legend(
    loc="lower right", bbox_to_anchor=(1.0, 0.985), ncol=columns,
    borderaxespad=0.0, handlelength=1.3, columnspacing=1.2, handletextpad=0.5,
    borderpad=0.3,
  )  # fmt: skip


def log_axis(ax: Any) -> None:
  """Log scale with plain numbers, in 1-2-5 steps where decades are few."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  ax.set_yscale("log")
  low, high = ax.get_ylim()
  subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
  if high / low < 4:
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
  ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
  ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
  ax.yaxis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
  """Three significant digits as a person writes them: 0.003, 4.5e-5."""
  if value and abs(value) < 1e-3:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
  """0.034 as `3.4 %`; a non-breaking space keeps sign and number together."""
  if 0 < share < 0.001:
    return "< 0.1\u00a0%"
  text = f"{100 * share:.2g}" if share < 0.095 else f"{100 * share:.0f}"
  return f"{text}\u00a0%"


def last_mean(x: np.ndarray, y: np.ndarray) -> float:
  """The running mean's last value; NaN without any."""
  _, ys = smooth(x, y)
  return float(ys[-1]) if len(ys) else float("nan")


def first_value(x: np.ndarray, y: np.ndarray) -> float:
  _, known = finite(x, y)
  return float(known[0]) if len(known) else float("nan")
