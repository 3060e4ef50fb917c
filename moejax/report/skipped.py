# SPDX-License-Identifier: Apache-2.0
"""Steps that were not taken, and whether the run has diverged nevertheless."""

from typing import Any

import numpy as np

from moejax.report.rundata import RunData
from moejax.stability import NOT_FINITE, REASONS, SPIKE

MAX_STEPS = 20
# Of a step: batches may have thousands.
MAX_ROWS = 8


def divergence(run: RunData) -> str | None:
  """What is not finite, and from which step on; None if all is well.

  A step that was not taken changed nothing, whatever its loss.
  """
  found = []
  if "loss/xent" in run.metrics:
    bad = ~np.isfinite(run.metrics["loss/xent"]) & (_reasons(run) == 0)
    found.append((bad, "loss is"))
  if "param_norm" in run.metrics:
    bad = ~np.isfinite(run.metrics["param_norm"])
    found.append((bad, "parameters are"))
  firsts = [
    (int(run.metrics.steps[bad][0]), what) for bad, what in found if bad.any()
  ]
  if not firsts:
    return None
  step, what = min(firsts, key=lambda first: first[0])
  return f"the {what} not finite from step {step} on"


def how_many(run: RunData) -> str | None:
  """`3 steps skipped (2 not finite, 1 spike)`; None if none was."""
  # The step that ends a run for the many before it has no line of metrics.
  reasons = [row["reason"] if "reason" in row else None for row in run.skipped]
  reasons = reasons or [int(r) for r in _reasons(run) if r]
  count = len(reasons)
  if not count:
    return None
  said = []
  if bad := reasons.count(NOT_FINITE):
    said.append(f"{bad:,} not finite")
  if spikes := reasons.count(SPIKE):
    said.append(f"{spikes:,} spike{'' if spikes == 1 else 's'}")
  plural = "" if count == 1 else "s"
  why = f" ({', '.join(said)})" if said else ""
  return f"{count:,} step{plural} skipped{why}"


def table(run: RunData) -> list[tuple[str, str, str]]:
  """Step, reason and rows of the first that were skipped."""
  return [
    (
      f"{row['step']:,}",
      _reason(row["reason"] if "reason" in row else None),
      _rows(run, row["rows"] if "rows" in row else []),
    )
    for row in run.skipped[:MAX_STEPS]
  ]


def _reasons(run: RunData) -> np.ndarray:
  """Of each logged step why it was not taken; 0 where it was."""
  if "skipped" not in run.metrics:  # a log from before there was such a thing
    return np.zeros(len(run.metrics))
  return np.nan_to_num(run.metrics["skipped"])


def _reason(number: Any) -> str:
  known = isinstance(number, int) and number in REASONS
  return REASONS[number] if known else str(number)


def _rows(run: RunData, rows: Any) -> str:
  """`text row 3, text row 7 and 6 more`; another shape as it is."""
  sources = run.record["config"]["data"]["sources"]
  try:
    pairs = [(int(source), int(row)) for source, row in rows]
  except (TypeError, ValueError, OverflowError):
    return str(rows)[:200]
  named = [
    f"{sources[s] if 0 <= s < len(sources) else f'source {s}'} row {row}"
    for s, row in pairs[:MAX_ROWS]
  ]
  more = len(pairs) - len(named)
  return ", ".join(named) + (f" and {more:,} more" if more else "")
