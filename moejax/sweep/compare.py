# SPDX-License-Identifier: Apache-2.0
"""What came of a sweep, as numbers: one result a run, one a point."""

import dataclasses
from pathlib import Path

import numpy as np

from moejax.errors import DataError
from moejax.generate import can_generate
from moejax.report.rundata import RunData, Table, load_run_data
from moejax.report.series import smooth
from moejax.sweep.spec import PlannedRun, Sweep
from moejax.sweep.state import RunState, read_state

LOSS = "loss/xent"
VALIDATION = "validation/xent"
# Of the routers, as means over the last tenth of a run.
ROUTER_KEYS = (
  "router/max_over_mean", "router/entropy", "router/experts_per_token",
  "router/dropped", "router/unrouted",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunResult:
  """One run; numbers are NaN where it has none.

  Attributes:
    planned: which run.
    state: how far it is.
    data: its logs; None if it has none yet.
  """

  planned: PlannedRun
  state: RunState
  data: RunData | None

  @property
  def final_loss(self) -> float:
    """Validation loss at the end, nats per token; else NaN.

    Without evaluations, the mean training loss of the last tenth.
    """
    if self.data is None or self.data.last_step < self.num_steps:
      return float("nan")
    if VALIDATION in self.data.evaluations:
      return float(self.data.evaluations[VALIDATION][-1])
    return self.late(LOSS)

  @property
  def num_steps(self) -> int:
    return self.planned.config.train.num_steps

  @property
  def tokens_per_second(self) -> float:
    """The median step's, so that compiling and saving do not count."""
    return self._median("tokens_per_second")

  def late(self, key: str) -> float:
    """Mean of a training metric over the last tenth of the steps so far."""
    if self.data is None or key not in self.data.metrics:
      return float("nan")
    values = self.data.metrics[key]
    last = values[-max(1, len(values) // 10) :]
    known = last[np.isfinite(last)]
    return float(known.mean()) if len(known) else float("nan")

  def number(self, name: str) -> float:
    """One of the sizes that config.json records."""
    return float("nan") if self.data is None else float(self.data.record[name])

  def _median(self, key: str) -> float:
    table = Table.of([]) if self.data is None else self.data.timing
    if key not in table or not len(table[key]):
      return float("nan")
    return float(np.median(table[key]))


@dataclasses.dataclass(frozen=True)
class PointResult:
  """All runs of a point."""

  name: str
  runs: tuple[RunResult, ...]

  @property
  def losses(self) -> dict[int, float]:
    """Final loss by seed, of the runs that have one."""
    found = {r.planned.seed: r.final_loss for r in self.runs}
    return {seed: loss for seed, loss in found.items() if np.isfinite(loss)}

  @property
  def looks_ahead(self) -> bool:
    """Whether its losses are of a model that sees later tokens."""
    return not can_generate(self.runs[0].planned.config.model)

  def mean(self, of) -> float:
    """Mean over the runs that have the number."""
    values = np.array([of(run) for run in self.runs])
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Points in the order of the sweep, and the one they are compared with.

  Attributes:
    title: of the sweep.
    points: results.
    reference: name of the point that others are compared with.
    options: what each point sets, and what all do.
  """

  title: str
  points: tuple[PointResult, ...]
  reference: str
  options: dict[str, dict[str, object]]
  common: dict[str, object]

  @property
  def validated(self) -> bool:
    """Whether final losses are of held-out text, for all runs that have one."""
    return all(
      VALIDATION in run.data.evaluations
      for point in self.points
      for run in point.runs
      if run.data is not None and np.isfinite(run.final_loss)
    )

  def ranked(self) -> list[PointResult]:
    """Best final loss first; points without one come last."""
    loss = lambda point: point.mean(lambda r: r.final_loss)
    return sorted(
      self.points, key=lambda p: (not np.isfinite(loss(p)), loss(p))
    )

  def difference(self, point: PointResult) -> tuple[float, float]:
    """Mean and standard error of a point's loss minus the reference's.

    By seed: runs of one seed see the same batches, so what the data does to
    both cancels. The error is NaN of fewer than two seeds.
    """
    base = next(p for p in self.points if p.name == self.reference).losses
    both = sorted(set(base) & set(point.losses))
    differences = np.array([point.losses[s] - base[s] for s in both])
    return mean_and_error(differences)

  def steps_to_equal(self, point: PointResult) -> float:
    """After which share of the steps the reference's last loss was reached.

    By running means of the training loss, seed by seed, then the mean; NaN if a
    seed did not get there.
    """
    base = {
      r.planned.seed: r
      for r in next(p for p in self.points if p.name == self.reference).runs
    }
    shares = [_share(run, base[run.planned.seed]) for run in point.runs]
    return float(np.mean(shares)) if shares else float("nan")


def _share(run: RunResult, base: RunResult) -> float:
  if not np.isfinite([run.final_loss, base.final_loss]).all():
    return float("nan")
  steps, loss = smooth(run.data.metrics.steps, run.data.metrics[LOSS])
  _, wanted = smooth(base.data.metrics.steps, base.data.metrics[LOSS])
  reached = steps[loss <= wanted[-1]]
  return reached[0] / base.num_steps if len(reached) else float("nan")


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and standard error; NaN where there are too few."""
  if not len(values):
    return float("nan"), float("nan")
  if len(values) == 1:
    return float(values[0]), float("nan")
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(error)


def compare(
  sweep: Sweep, planned: list[PlannedRun], workdir: Path
) -> Comparison:
  """Reads the logs of all runs, finished or not.

  Raises:
    DataError: none of them has a finished step.
  """
  results: dict[str, list[RunResult]] = {name: [] for name in sweep.points}
  for run in planned:
    folder = workdir / run.name
    try:
      data = load_run_data(folder)
    except DataError:
      data = None  # has not begun, or failed before its first step
    results[run.point].append(RunResult(run, read_state(folder), data))
  if not any(r.data for found in results.values() for r in found):
    raise DataError(f"{workdir} has no run with a finished step to compare")
  return Comparison(
    title=sweep.title,
    points=tuple(PointResult(n, tuple(r)) for n, r in results.items()),
    reference=sweep.reference,
    options={n: dict(options) for n, options in sweep.points.items()},
    common=dict(sweep.common),
  )
