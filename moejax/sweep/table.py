# SPDX-License-Identifier: Apache-2.0
"""The comparison as a table: columns, text, Markdown, JSON."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats

from moejax.files import write_atomically
from moejax.progress import format_count
from moejax.report.charts import number
from moejax.sweep.compare import (
  Comparison,
  PointResult,
  differences_by_seed,
  mean_and_error,
)

TABLE, NUMBERS = "comparison.md", "comparison.json"


@dataclasses.dataclass(frozen=True)
class Column:
  """One column: how its number is found, written and explained."""

  key: str
  heading: str
  explanation: str
  value: Callable[[Comparison, PointResult], float]
  write: Callable[[float], str]


def columns(comparison: Comparison) -> list[Column]:
  """Those that say something of these runs."""
  found = [
    Column("loss", "final loss", _loss_note(comparison), _loss,
           "{:.4f}".format),
    Column(
      "difference", f"against {comparison.reference}",
      f"final loss minus that of {comparison.reference}, mean over seeds"
      + "; runs of one seed see the same batches" * comparison.same_batches,
      _difference, "{:+.4f}".format,
    ),
    Column(
      "steps_to_equal", "equal after", "share of the steps after which the "
      "training loss (mean of a tenth of the run) stayed at or below "
      f"{comparison.reference}'s last, mean over seeds; – where in one of them "
      f"it did not. That of {comparison.reference} itself shows what noise "
      "makes",
      lambda c, p: c.steps_to_equal(p), "{:.0%}".format,
    ),
    Column(
      "tokens_per_second", "tokens/s", "median step's tokens per second, mean "
      "over finished runs", lambda c, p: p.mean(lambda r: r.tokens_per_second),
      "{:,.0f}".format,
    ),
    _router(
      "router/max_over_mean", "busiest expert",
      "assignments of the busiest expert over the fair share, of the worst "
      "layer; 1 is perfect balance", "{:.2f}".format,
    ),
    _router(
      "router/entropy", "entropy", "mean entropy of the router's probabilities "
      "as a share of the largest; 1 is undecided", "{:.2f}".format,
    ),
    _router(
      "router/experts_per_token", "experts/token",
      "mean number of experts that see a token", "{:.2f}".format,
    ),
    _router(
      "router/dropped", "dropped", "share of assignments that went to no "
      "expert", "{:.1%}".format,
    ),
    _router(
      "router/unrouted", "unrouted", "share of tokens that no expert sees",
      "{:.1%}".format,
    ),
    Column(
      "skipped", "skipped", "steps that were not taken (docs/recipe.md), mean "
      "over runs", lambda c, p: p.mean(lambda r: r.skipped), "{:g}".format,
    ),
    Column(
      "num_active_params", "active", "parameters that a token uses, at most",
      lambda c, p: p.mean(lambda r: r.number("num_active_params")),
      format_count,
    ),
    Column(
      "num_params", "total", "parameters",
      lambda c, p: p.mean(lambda r: r.number("num_params")), format_count,
    ),
  ]  # fmt: skip
  return [column for column in found if _says_something(comparison, column)]


def _says_something(comparison: Comparison, column: Column) -> bool:
  """No drops in any run, no column of drops."""
  values = [column.value(comparison, point) for point in comparison.points]
  known = [value for value in values if math.isfinite(value)]
  if column.key in ("router/dropped", "router/unrouted", "skipped"):
    return any(known)
  return bool(known)


def cell(comparison: Comparison, column: Column, point: PointResult) -> str:
  """A number as written, with its standard error over seeds if it has one."""
  value = column.value(comparison, point)
  itself = point.name == comparison.reference
  if column.key == "loss" and point.diverged:
    return "not finite"
  if not math.isfinite(value):
    return "–"
  text = column.write(value)
  if column.key == "loss":
    _, error = mean_and_error(np.array(list(point.losses.values())))
  elif column.key == "difference":
    if itself:
      return "0"
    _, error = comparison.difference(point)
  else:
    return text
  return f"{text} ± {error:.4f}" if math.isfinite(error) else text


def headline(comparison: Comparison) -> str:
  """Who ends lowest, in as many words as the numbers bear."""
  # A loss that looks ahead, or is of other text, is lower for free.
  fair = [
    point
    for point in comparison.ranked()
    if point.losses
    and not (point.looks_ahead or point.diverged or comparison.other(point))
  ]
  if not fair:
    return "No point whose loss can be held against others"
  best, *others = fair
  if not others:
    return f"{best.name} ends at {best.loss:.4g}"
  for other in others:
    if doubt := _doubt(best, other):
      return doubt
  title = f"{best.name} ends lowest"
  mean, error = comparison.difference(best)
  if best.name != comparison.reference and math.isfinite(mean):
    title += f", {number(-mean)} below {comparison.reference}"
    title += f" (± {number(error)})" if math.isfinite(error) else ""
  return title


def _doubt(best: PointResult, other: PointResult) -> str:
  """A headline that says why the best is not sure to be below another."""
  found = differences_by_seed(other, best)
  if not len(found):
    return f"Lowest: {best.name}; no seed in common with {other.name}"
  if not found.any():
    return f"{best.name} and {other.name} end at the same loss"
  if len(found) == 1:
    return f"Lowest: {best.name}, in a single seed"
  if is_above_zero(found):
    return ""
  every = "both seeds" if len(found) == 2 else f"all {len(found)} seeds"
  where = f"in {every}" if (found > 0).all() else "not in every seed"
  return f"Lowest: {best.name}, {where}; too few to tell it from {other.name}"


def is_above_zero(differences: np.ndarray) -> bool:
  """Whether their mean is, by Student's t: few seeds know little of errors.

  At 95%, two-sided: 12.7 standard errors of two seeds, 4.3 of three.
  """
  mean, error = mean_and_error(differences)
  return mean > scipy.stats.t.ppf(0.975, len(differences) - 1) * error


def order_note(comparison: Comparison) -> str:
  """By what rows are sorted, and what that makes of missing seeds."""
  said = f"Sorted by the difference to {comparison.reference}, seed by seed"
  if not comparison.point(comparison.reference).losses:
    said = f"Sorted by final loss, as {comparison.reference} has none"
  if any(point.seeds_found for point in comparison.points):
    said = f"{said}; a final loss is the mean of the seeds there are"
  others = [
    f"{point.name} {why}"
    for point in comparison.points
    if (why := comparison.why_left_out(point))
  ]
  said += f". Not compared: {'; '.join(others)}" * bool(others)
  mixtures = [
    f"{point.name} {why}"
    for point in comparison.points
    if (why := comparison.other_mixture(point))
    and not comparison.why_left_out(point)
  ]
  said += f". Training losses not compared: {'; '.join(mixtures)}" * bool(
    mixtures
  )
  return f"{said}."


def as_rows(comparison: Comparison) -> list[list[str]]:
  """Heading and a row a point, best first."""
  shown = columns(comparison)
  rows = [["point", *(column.heading for column in shown), "runs"]]
  for point in comparison.ranked():
    cells = [cell(comparison, column, point) for column in shown]
    done = f"{len(point.losses)}/{len(point.runs)}"
    rows.append([point.name + "*" * point.looks_ahead, *cells, done])
  return rows


def footnote(comparison: Comparison) -> str:
  """What the star behind some names means; empty without one."""
  if not any(point.looks_ahead for point in comparison.points):
    return ""
  return (
    "* its router looks at later tokens: its loss is no language model's, and "
    "it cannot generate"
  )


def as_text(comparison: Comparison) -> str:
  """For a terminal or a log."""
  rows = as_rows(comparison)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(
      text.ljust(width) if i == 0 else text.rjust(width)
      for i, (text, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  ]
  notes = filter(None, [order_note(comparison), footnote(comparison)])
  return "\n".join([comparison.title, *lines, *notes])


def as_markdown(comparison: Comparison) -> str:
  """For a README."""
  first, *rest = as_rows(comparison)
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = "|".join(["", "---", *["---:"] * (len(first) - 1), ""])
  lines = [line(first), rule, *map(line, rest), "", order_note(comparison)]
  if note := footnote(comparison).replace("*", "\\*"):
    lines += ["", note]
  return "\n".join(lines) + "\n"


def write_tables(comparison: Comparison, workdir: Path) -> None:
  """Writes comparison.md and comparison.json."""
  write_atomically(workdir / TABLE, as_markdown(comparison))
  shown = columns(comparison)
  numbers = {
    "title": comparison.title,
    "reference": comparison.reference,
    "columns": {column.key: column.explanation for column in shown},
    "common": comparison.common,
    "points": {
      point.name: {
        "options": comparison.options[point.name],
        "final_loss_by_seed": point.losses,
        **{c.key: _plain(c.value(comparison, point)) for c in shown},
      }
      for point in comparison.points
    },
  }
  text = json.dumps(numbers, indent=2, default=str) + "\n"
  write_atomically(workdir / NUMBERS, text)


def _plain(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _loss_note(comparison: Comparison) -> str:
  what = "validation loss at the end"
  if not comparison.validated:
    what = "training loss, mean of the last tenth"
  return (
    f"{what}, nats per token; mean and standard error over seeds, of which two "
    "or three say little"
  )


def _loss(comparison: Comparison, point: PointResult) -> float:
  del comparison
  return point.loss


def _difference(comparison: Comparison, point: PointResult) -> float:
  return comparison.difference(point)[0]


def _router(key: str, heading: str, note: str, write) -> Column:
  return Column(
    key, heading, f"{note}; mean over the last tenth of the steps, of finished "
    "runs",
    lambda c, p: p.mean(lambda run: run.late(key)), write,
  )  # fmt: skip
