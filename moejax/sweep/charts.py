# SPDX-License-Identifier: Apache-2.0
"""Pictures of a comparison: where points end, how they get there, the cost.

Curves carry the ids `curve-POINT`, by which the page picks one out.
"""

import itertools
from typing import Any

import numpy as np

from moejax.report.charts import (
  FULL,
  Chart,
  head_axis,
  percent,
  reference_line,
  step_axes,
)  # fmt: skip
from moejax.report.series import smooth
from moejax.report.style import LIGHT
from moejax.sweep.compare import (
  LOSS,
  Comparison,
  PointResult,
  RunResult,
)
from moejax.sweep.table import headline

HALF = (FULL - 54) // 2

# Told apart on light and dark pages; further points take dashes.
COLOURS = (
  "#0b6bb4", "#d9580d", "#098a67", "#a3518c", "#c79a1b", "#3aa6c9", "#c0392b",
  "#7a6ad8", "#6b8e23", "#8c6d5a",
)  # fmt: skip
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))


def make_charts(comparison: Comparison) -> list[Chart]:
  """All that there is data for."""
  charts = [
    final_losses(comparison), loss_and_speed(comparison),
    loss_curves(comparison), differences(comparison),
    router_curves(comparison, "router/max_over_mean", "load",
                  "The busiest expert's load", "Assignments of the busiest "
                  "expert over the fair share, of the worst layer", 1.0),
    router_curves(comparison, "router/dropped", "dropped",
                  "Dropped assignments", "Share that went to no expert", 0.0),
    router_curves(comparison, "router/unrouted", "unrouted",
                  "Tokens without an expert", "Share of all tokens", 0.0),
  ]  # fmt: skip
  return [chart for chart in charts if chart is not None]


def final_losses(comparison: Comparison) -> Chart | None:
  """One line a point, one dot a seed, the mean as a bar; best on top."""
  points = [
    p for p in comparison.ranked() if p.losses and not comparison.other(p)
  ]
  if not points:
    return None
  base = comparison.point(comparison.reference).loss

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    for row, point in enumerate(points):
      losses = np.array(list(point.losses.values()))
      colour, _ = _look(comparison, point.name)
      bar = [comparison.placed(point)] * 2, [row - 0.3, row + 0.3]
      if point.seeds_found:
        ax.plot(*bar, color=colour, linewidth=5, solid_capstyle="butt")
      ax.plot(*bar, color=LIGHT["card"] if point.seeds_found else colour,
              linewidth=2.5, solid_capstyle="butt")  # fmt: skip
      ax.plot(losses, [row] * len(losses), "o", color=colour, alpha=0.75,
              markersize=5)  # fmt: skip
    if np.isfinite(base):
      ax.axvline(base, color=LIGHT["soft"], linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(points)), [_label(p) for p in points])
    for label in ax.get_yticklabels():
      label.set_color(LIGHT["ink"])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    ax.set_xlabel("nats per token: lower is better")
    del narrow

  what = "validation" if comparison.validated else "training"
  height = max(216, 70 + 26 * len(points))
  return Chart(
    "final-loss", headline(comparison), f"Final {what} loss: a dot for each "
    "seed, a bar at their mean; the dashed line is "
    f"{comparison.reference}.{_marks(comparison)}", draw,
    (HALF, height), (348, height),
  )  # fmt: skip


def _label(point: PointResult) -> str:
  return ", ".join(filter(None, [_starred(point), point.seeds_found]))


def _starred(point: PointResult) -> str:
  return point.name + "*" * point.looks_ahead


def _marks(comparison: Comparison) -> str:
  """What a hollow mark and a star are; empty without them."""
  base, said = comparison.reference, _star(comparison)
  if any(p.losses and p.seeds_found for p in comparison.points):
    said += (
      f" Hollow: seeds are missing; the mean is then that of {base} plus the "
      f"difference to {base} in the seeds there are."
    )
  return said


def _star(comparison: Comparison) -> str:
  if not any(point.looks_ahead for point in comparison.points):
    return ""
  return " A star: its router looks at later tokens."


def loss_curves(comparison: Comparison) -> Chart | None:
  """Training loss of all points on the same text, seeds as bands."""
  curves = {
    p.name: _bands(p, LOSS)
    for p in comparison.points
    if not (comparison.other(p) or comparison.other_mixture(p))
  }
  curves = {name: found for name, found in curves.items() if found}
  if not curves:
    return None

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, _steps(comparison), "" if narrow else "nats/token")
    _draw_bands(ax, comparison, curves)
    late = np.concatenate([y[len(y) // 10 :] for _, y, _, _ in curves.values()])
    low, high = late.min(), late.max()
    ax.set_ylim(low - 0.04 * (high - low), high + 0.1 * (high - low))
    _name_ends(ax, comparison, curves, narrow)

  return Chart(
    "loss-curves", "How the training loss falls",
    "Cross entropy, running mean; the band is the range over seeds, and may "
    f"leave the picture.{_star(comparison)}", draw, (FULL, 470), (348, 320),
  )  # fmt: skip


def differences(comparison: Comparison) -> Chart | None:
  """Each point's training loss minus the reference's, batch by batch."""
  base = {
    r.planned.seed: r.data for r in comparison.point(comparison.reference).runs
  }
  curves = {}
  for point in comparison.points:
    if point.name == comparison.reference or comparison.other(point):
      continue
    if comparison.other_mixture(point):
      continue
    pairs = [
      _difference(run, base[run.planned.seed])
      for run in point.runs
      if run.data is not None and base[run.planned.seed] is not None
    ]
    if found := _band(pairs):
      curves[point.name] = found
  if not curves:
    return None

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, _steps(comparison), "" if narrow else "nats/token")
    _draw_bands(ax, comparison, curves)
    late = np.concatenate([y[len(y) // 5 :] for _, y, _, _ in curves.values()])
    room = max(1e-3, 0.1 * (max(late.max(), 0) - min(late.min(), 0)))
    ax.set_ylim(min(late.min(), 0) - room, max(late.max(), 0) + room)
    reference_line(ax, 0.0, comparison.reference, left=True)
    _name_ends(ax, comparison, curves, narrow)

  unit = "batch" if comparison.same_batches else "step"
  return Chart(
    "difference", f"Training loss against {comparison.reference}'s",
    f"Its difference to that of the same {unit} and seed, running mean; the "
    "band is the range over seeds, and may leave the picture. Below zero is "
    f"better.{_star(comparison)}", draw, (FULL, 400), (348, 300),
  )  # fmt: skip


def loss_and_speed(comparison: Comparison) -> Chart | None:
  """Final loss over tokens per second."""
  found = [
    (p, p.mean(lambda r: r.tokens_per_second), comparison.placed(p))
    for p in comparison.points
  ]
  found = [f for f in found if np.isfinite(f[1:]).all()]
  if len(found) < 2:
    return None

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    x, y = (np.array(values) for values in list(zip(*found))[1:])
    ax.set_xlim(x.min() * 0.93, x.max() * 1.03)
    room = max(1e-3, 0.06 * np.ptp(y))
    ax.set_ylim(y.min() - room, y.max() + room)
    for point, speed, loss in found:
      colour, _ = _look(comparison, point.name)
      inside = LIGHT["card"] if point.seeds_found else colour
      ax.plot(speed, loss, "o", color=colour, markersize=7, markeredgewidth=1.5,
              markerfacecolor=inside, gid=f"curve-{point.name}")  # fmt: skip
    _name_at_side(ax, comparison, [(p, (s, y)) for p, s, y in found])
    ax.set_xlabel("tokens per second")
    head_axis(ax, "final loss, nats per token")
    del narrow

  return Chart(
    "loss-speed", "Loss against speed", "Best is right and below. Speed is the "
    "median step's; runs that were at work at once share the machine."
    f"{_marks(comparison)}", draw,
    (HALF, max(216, 70 + 26 * len(found))), (348, 320),
  )  # fmt: skip


def router_curves(
  comparison: Comparison, key: str, name: str, title: str, note: str,
  least: float,
) -> Chart | None:  # fmt: skip
  """A routing metric of all points over steps; None if it says nothing."""
  curves = {p.name: _bands(p, key) for p in comparison.points}
  curves = {
    n: found for n, found in curves.items() if found and found[3].max() > least
  }
  if not curves:
    return None

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, _steps(comparison))
    _draw_bands(ax, comparison, curves)
    if least == 0.0:
      from matplotlib.ticker import FuncFormatter

      ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y)))
      ax.set_ylim(bottom=0.0)
    else:
      reference_line(ax, least, "perfect balance", below=True)
    _name_ends(ax, comparison, curves, narrow)

  return Chart(
    name, title, f"{note}; running mean, the band is the range over seeds.",
    draw, (FULL, 340), (348, 300),
  )  # fmt: skip


Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _bands(point: PointResult, key: str) -> Band | None:
  return _band([
    smooth(run.data.metrics.steps, run.data.metrics[key])
    for run in point.runs
    if run.data is not None and key in run.data.metrics
  ])  # fmt: skip


def _band(curves: list[tuple[np.ndarray, np.ndarray]]) -> Band | None:
  """Steps, mean, lowest and highest of several curves, as far as all go."""
  curves = [(x, y) for x, y in curves if len(x)]
  if not curves:
    return None
  end = min(x[-1] for x, _ in curves)
  grid = next(x for x, _ in curves if x[-1] == end)
  values = np.stack([np.interp(grid, x, y) for x, y in curves])
  return grid, values.mean(0), values.min(0), values.max(0)


def _difference(run: RunResult, base: Any) -> tuple[np.ndarray, np.ndarray]:
  assert run.data is not None
  steps, mine, theirs = np.intersect1d(
    run.data.metrics.steps, base.metrics.steps, return_indices=True
  )
  return smooth(
    steps, run.data.metrics[LOSS][mine] - base.metrics[LOSS][theirs]
  )


def _draw_bands(
  ax: Any, comparison: Comparison, curves: dict[str, Band]
) -> None:
  for name, (x, mean, low, high) in curves.items():
    colour, dashes = _look(comparison, name)
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0,
                    gid=f"band-{name}")  # fmt: skip
    width = 2.4 if name == comparison.reference else 1.5
    ax.plot(x, mean, color=colour, linestyle=dashes, linewidth=width,
            gid=f"curve-{name}")  # fmt: skip


def _name_ends(
  ax: Any, comparison: Comparison, curves: dict[str, Band], narrow: bool
) -> None:
  """Names beside the ends of curves, moved apart where they would touch."""
  if narrow:
    return
  low, high = ax.get_ylim()
  ends = {n: np.clip(y[-1], low, high) for n, (_, y, _, _) in curves.items()}
  order = sorted(ends, key=lambda n: ends[n])
  height = ax.figure.bbox.height
  gap = (high - low) * 13.0 / (0.78 * height)
  places = spread(np.array([ends[n] for n in order]), gap, low, high)
  for name, place in zip(order, places):
    colour, _ = _look(comparison, name)
    ax.annotate(
      _starred(comparison.point(name)), (1.0, place), (8, 0),
      xycoords=("axes fraction", "data"),
      textcoords="offset points", va="center", color=colour, fontsize=10,
      annotation_clip=False, gid=f"name-{name}",
    )  # fmt: skip


def _name_at_side(
  ax: Any,
  comparison: Comparison,
  points: list[tuple[PointResult, tuple[float, float]]],
) -> None:
  """Names in a column at the right, each with a thin line to its point."""
  low, high = ax.get_ylim()
  order = sorted(points, key=lambda found: found[1][1])
  gap = (high - low) * 13.0 / (0.78 * ax.figure.bbox.height)
  heights = np.array([y for _, (_, y) in order])
  places = spread(heights, gap, low, high)
  for (point, where), place in zip(order, places):
    colour, _ = _look(comparison, point.name)
    ax.annotate(
      _label(point), where, (1.03, place), xycoords="data",
      textcoords=("axes fraction", "data"), va="center", color=colour,
      fontsize=9.5, annotation_clip=False, gid=f"name-{point.name}",
      arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colour,
                  "linewidth": 0.6, "alpha": 0.6, "shrinkA": 2, "shrinkB": 0},
    )  # fmt: skip


def spread(
  values: np.ndarray, gap: float, low: float, high: float
) -> np.ndarray:
  """Sorted values, moved as little as it takes to be `gap` apart in bounds."""
  groups: list[list[float]] = []  # of values that touch: [sum, count]
  for value in values:
    groups.append([float(value), 1])
    while len(groups) > 1 and _touch(groups[-2], groups[-1], gap):
      total, count = groups.pop()
      groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
  places = []
  for total, count in groups:
    half = (count - 1) / 2 * gap
    middle = total / count
    if high - low >= 2 * half:
      middle = min(max(middle, low + half), high - half)
    places += [middle - half + i * gap for i in range(int(count))]
  # Bounds may have pushed groups into each other.
  for i, j in itertools.pairwise(range(len(places))):
    places[j] = max(places[j], places[i] + gap)
  return np.array(places)


def _touch(first: list[float], second: list[float], gap: float) -> bool:
  top = first[0] / first[1] + (first[1] - 1) / 2 * gap
  bottom = second[0] / second[1] - (second[1] - 1) / 2 * gap
  return bottom - top < gap


def _look(comparison: Comparison, name: str) -> tuple[str, Any]:
  """Colour and dashes of a point, the same in all pictures."""
  place = [p.name for p in comparison.points].index(name)
  turn, colour = divmod(place, len(COLOURS))
  return COLOURS[colour], DASHES[turn % len(DASHES)]


def _steps(comparison: Comparison) -> int:
  return max(r.num_steps for p in comparison.points for r in p.runs)
