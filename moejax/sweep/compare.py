# SPDX-License-Identifier: Apache-2.0
"""What came of a sweep, as numbers: one result a run, one a point."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moejax.cli import parse_overrides
from moejax.config import Config, phases_of
from moejax.errors import DataError
from moejax.generate import can_generate
from moejax.metrics import METRICS, last_step
from moejax.report.rundata import (
  ALIKE,
  RunData,
  Table,
  load_run_data,
  other_text,
)
from moejax.sweep.spec import PlannedRun, Sweep
from moejax.sweep.state import RunState, read_state

LOSS = "loss/xent"
VALIDATION, VALIDATED = "validation/xent", "validation/tokens"
SKIPPED = "skipped"
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
  def finished(self) -> bool:
    """Whether it has logged its last step."""
    return self.data is not None and self.data.last_step >= self.num_steps

  @property
  def validation_loss(self) -> float:
    """Of the evaluation after the last step; NaN without one."""
    return self._at_end(VALIDATION)

  @property
  def validated(self) -> bool:
    """Whether it was evaluated after its last step, whatever came out."""
    return np.isfinite(self.validated_tokens)

  @property
  def validated_tokens(self) -> float:
    return self._at_end(VALIDATED)

  @property
  def skipped(self) -> float:
    """How many of its steps were not taken."""
    return float("nan") if self.data is None else float(np.sum(~self.taken))

  def _at_end(self, key: str) -> float:
    evaluations = Table.of([]) if self.data is None else self.data.evaluations
    if key not in evaluations:
      return float("nan")
    last = evaluations.steps == self.num_steps
    values = evaluations[key][last]
    return float(values[-1]) if len(values) else float("nan")

  @property
  def training_loss(self) -> float:
    """Mean of the last tenth of the steps, once it has finished; else NaN."""
    return self.late(LOSS)

  @property
  def num_steps(self) -> int:
    return self.planned.config.train.num_steps

  @property
  def tokens_per_second(self) -> float:
    """The median step's, so that compiling and saving do not count.

    NaN of a run that has not finished, as all that is measured.
    """
    return self._median("tokens_per_second")

  def late(self, key: str) -> float:
    """Mean of a training metric over the last tenth of a finished run."""
    if not self.finished or key not in self.data.metrics:
      return float("nan")
    values = self.data.metrics[key]
    last = slice(-max(1, len(values) // 10), None)
    taken = values[last][self.taken[last]]
    return float(taken.mean()) if len(taken) else float("nan")

  @property
  def taken(self) -> np.ndarray:
    """Which of its steps were taken, bool [steps]."""
    metrics = self.data.metrics
    if SKIPPED not in metrics:
      return np.ones(len(metrics), bool)
    return metrics[SKIPPED] == 0

  def number(self, name: str) -> float:
    """One of the sizes that config.json records."""
    return float("nan") if self.data is None else float(self.data.record[name])

  def _median(self, key: str) -> float:
    table = self.data.timing if self.finished else Table.of([])
    if key not in table or not len(table[key]):
      return float("nan")
    return float(np.median(table[key]))


@dataclasses.dataclass(frozen=True)
class PointResult:
  """All runs of a point.

  Attributes:
    name: of the point.
    runs: by seed.
    validated: whether final losses are validation losses, or training losses.
  """

  name: str
  runs: tuple[RunResult, ...]
  validated: bool

  @property
  def losses(self) -> dict[int, float]:
    """Final loss by seed, of the runs that have one."""
    found = {
      r.planned.seed: r.validation_loss if self.validated else r.training_loss
      for r in self.runs
    }
    return {seed: loss for seed, loss in found.items() if np.isfinite(loss)}

  @property
  def loss(self) -> float:
    """Mean of the final losses; NaN without any."""
    return mean_and_error(np.array(list(self.losses.values())))[0]

  @property
  def diverged(self) -> bool:
    """Whether a run has come to its end with a loss that is not finite."""
    ended = [run for run in self.runs if run.finished]
    return len(ended) > len(self.losses)

  @property
  def seeds_found(self) -> str:
    """`k/n seeds` of a point that lacks some; else empty."""
    found, wanted = len(self.losses), len(self.runs)
    return f"{found}/{wanted} seeds" if found < wanted else ""

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
    options: what each point sets.
    common: what all of them set, the command line's options included.
    config: file of the config that they set it in.
  """

  title: str
  points: tuple[PointResult, ...]
  reference: str
  options: dict[str, dict[str, object]]
  common: dict[str, object]
  config: str

  @property
  def validated(self) -> bool:
    """Whether final losses are of held-out text."""
    return self.points[0].validated

  def point(self, name: str) -> PointResult:
    return next(p for p in self.points if p.name == name)

  def ranked(self) -> list[PointResult]:
    """Best first: by the difference to the reference, seed by seed.

    Then points that have no seed in common with it, by their mean loss, then
    those without a loss, or with one that is not finite.
    """

    def key(point: PointResult) -> tuple[int, float]:
      difference, _ = self.difference(point)
      if np.isfinite(difference):
        return 0, difference
      lost = point.diverged or not np.isfinite(point.loss)
      return (2, 0.0) if lost else (1, point.loss)

    return sorted(self.points, key=key)

  def difference(self, point: PointResult) -> tuple[float, float]:
    """Mean and standard error of a point's loss minus the reference's."""
    if self.other(point) or point.diverged:
      return float("nan"), float("nan")
    return mean_and_error(
      differences_by_seed(point, self.point(self.reference))
    )

  def why_left_out(self, point: PointResult) -> str:
    """Why a point is not ranked beside the others, or empty."""
    lost = "ended with a loss that is not finite"
    return self.other(point) or lost * point.diverged

  def other(self, point: PointResult) -> str:
    """Why a point's losses cannot be held against the reference's, or empty."""
    both = self.point(self.reference), point
    base, own = (
      dataclasses.asdict(p.runs[0].planned.config.data) for p in both
    )
    if differ := other_text(base, own):
      return f"has another data.{differ}"
    if not self.validated and (why := self.other_mixture(point)):
      return why
    tokens = [p.mean(lambda run: run.validated_tokens) for p in both]
    if self.validated and max(tokens) > (1 + ALIKE) * min(tokens):
      return f"was validated on {tokens[1]:,.0f} tokens, not {tokens[0]:,.0f}"
    return ""

  def other_mixture(self, point: PointResult) -> str:
    """Why its training losses are of other text than the reference's, or empty.

    Their validation losses may be of the same.
    """
    both = self.point(self.reference), point
    base, own = (_mixtures(p.runs[0].planned.config) for p in both)
    return "was trained with other data.weights" if base != own else ""

  @property
  def same_batches(self) -> bool:
    """Whether runs of one seed see the same batches at all points."""
    configs = [p.runs[0].planned.config for p in self.points]
    shapes = {
      (c.train.batch_size, c.train.phases, c.data.seq_len, c.data.weights,
       c.data.order)
      for c in configs
    }  # fmt: skip
    return len(shapes) == 1 and not any(map(self.other, self.points))

  def placed(self, point: PointResult) -> float:
    """A mean loss to hold against other points', also if seeds are missing.

    The reference's mean plus the difference by seed: a point whose only seed is
    an easy one is not better for it. NaN if none of its seeds has a loss of the
    reference. Without any such loss, the mean itself.
    """
    base = self.point(self.reference).loss
    if not np.isfinite(base):
      return point.loss
    if point.name == self.reference:
      return base
    return base + self.difference(point)[0]

  def steps_to_equal(self, point: PointResult) -> float:
    """After which share of the steps the reference's last loss was reached.

    And not left again, by running means of the training loss, seed by seed,
    then the mean; NaN if a seed did not get there, and where training losses
    are of other text.
    """
    if self.other(point) or self.other_mixture(point):
      return float("nan")
    base = {r.planned.seed: r for r in self.point(self.reference).runs}
    shares = [_share(run, base[run.planned.seed]) for run in point.runs]
    return float(np.mean(shares)) if shares else float("nan")


def differences_by_seed(point: PointResult, base: PointResult) -> np.ndarray:
  """A point's loss minus another's, of each seed that both have.

  Runs of one seed see the same batches, so what the data does to both cancels.
  """
  both = sorted(set(base.losses) & set(point.losses))
  return np.array([point.losses[s] - base.losses[s] for s in both])


def _share(run: RunResult, base: RunResult) -> float:
  """After which share of the reference's steps its last loss was kept up.

  Both losses are means of as many steps, a tenth of the reference's, up to the
  step in question.
  """
  if not (run.finished and base.finished):
    return float("nan")
  width = max(1, base.num_steps // 10)
  steps, means = _running_means(run, width)
  _, wanted = _running_means(base, width)
  if not (len(means) and len(wanted)):
    return float("nan")
  if not np.isfinite(wanted[-1]):
    return float("nan")
  # A mean that is not a number is not below anything.
  below = means <= wanted[-1] + 1e-6 * abs(wanted[-1])
  above = np.flatnonzero(~below)
  first = above[-1] + 1 if len(above) else 0
  return float("nan") if first == len(means) else steps[first] / base.num_steps


def _mixtures(config: Config) -> list[tuple[int, tuple[float, ...]]]:
  """The weights of its sources, and the steps before each of them holds."""
  found: list[tuple[int, tuple[float, ...]]] = []
  for phase in phases_of(config):
    weights = phase.config.data.weights
    if not found or found[-1][1] != weights:
      found.append((phase.start, weights))
  return found


def _running_means(run: RunResult, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Last steps and means of the training loss over `width` taken steps."""
  steps = run.data.metrics.steps[run.taken]
  loss = run.data.metrics[LOSS][run.taken]
  if len(loss) < width:
    return steps[:0], loss[:0]
  means = np.convolve(loss, np.full(width, 1 / width), "valid")
  return steps[width - 1 :], means


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and standard error; NaN where there are too few."""
  if not len(values):
    return float("nan"), float("nan")
  if len(values) == 1:
    return float(values[0]), float("nan")
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(error)


def compare(
  sweep: Sweep,
  planned: list[PlannedRun],
  workdir: Path,
  extra_args: Sequence[str] = (),
) -> Comparison:
  """Reads the logs of all runs, finished or not.

  Args:
    sweep: the sweep.
    planned: its runs.
    workdir: where they are.
    extra_args: the command line's options for all of them.

  Raises:
    DataError: none of them has a finished step, or a log is damaged.
  """
  results: dict[str, list[RunResult]] = {name: [] for name in sweep.points}
  for run in planned:
    folder = workdir / run.name
    begun = last_step(folder / METRICS) > 0
    data = load_run_data(folder) if begun else None
    results[run.point].append(RunResult(run, read_state(folder), data))
  every = [run for found in results.values() for run in found]
  if not any(run.data for run in every):
    raise DataError(f"{workdir} has no run with a finished step to compare")
  # One kind of loss for all: a training loss is not to be held against others.
  validated = all(r.validated for r in every if r.finished)
  return Comparison(
    title=sweep.title,
    points=tuple(
      PointResult(n, tuple(r), validated) for n, r in results.items()
    ),
    reference=sweep.reference,
    options={n: dict(options) for n, options in sweep.points.items()},
    common={**sweep.common, **parse_overrides(extra_args)},
    config=sweep.config,
  )
