# SPDX-License-Identifier: Apache-2.0
"""Both fits of one set of points, and what they say about a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.scaling.isoflop import IsoFlopFit, fit_isoflop
from moejax.scaling.laws import (
  CHINCHILLA,
  CHINCHILLA_REFITTED,
  HUNYUAN_LARGE,
  ComputeLaw,
  PowerLaw,
)
from moejax.scaling.parametric import LossFit, fit_loss
from moejax.scaling.points import Points, compute_law

CONFIDENCE = 0.95
RESAMPLES = 300


@dataclasses.dataclass(frozen=True)
class ScalingFit:
  """What was fitted, and what could not be.

  Attributes:
    points: finished runs.
    count: what N counts, `active` or `non-embedding`.
    compute: C = K N^p D of the points, for the parametric law's optimum.
    compute_error: its largest relative error at a point.
    isoflop: None if `problems` says why.
    parametric: None if `problems` says why.
    problems: of fits that are missing.
    resamples, seed: of the intervals.
  """

  points: Points
  count: str
  compute: ComputeLaw
  compute_error: float
  isoflop: IsoFlopFit | None
  parametric: LossFit | None
  problems: tuple[str, ...]
  resamples: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and the CONFIDENCE interval of its resamples, if there are any."""

  value: float
  low: float | None = None
  high: float | None = None

  @classmethod
  def of(cls, value: Any, resampled: Any = None) -> "Estimate":
    if resampled is None:
      return cls(float(value))
    low, high = interval(resampled)
    return cls(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Optimum:
  """Compute-optimal N and D of one budget, by one fit.

  Attributes:
    method: `isoflop`, `parametric`, or whose published fit.
    params, tokens: N and D.
    loss: nats per token there; None for power laws, which have none, and for
      others' laws, whose losses are of other tokens.
    beyond: the budget over the largest compute that the fit rests on if it is
      larger, over the smallest if it is smaller, else 1; None for published
      laws.
  """

  method: str
  params: Estimate
  tokens: Estimate
  loss: Estimate | None = None
  beyond: float | None = None


def fit_points(
  points: Points,
  count: str = "active",
  resamples: int = RESAMPLES,
  seed: int = 0,
  advance: Callable[[], None] = lambda: None,
) -> ScalingFit:
  """IsoFLOP valleys and the parametric law of the same points.

  Args:
    points: finished runs, see `moejax.scaling.points.read_points`.
    count: what their N counts; goes into the result's words.
    resamples: draws behind each interval.
    seed: of the draws.
    advance: called after each draw of the parametric fit.

  Raises:
    UserError: neither can be fitted; says what each needs.
  """
  isoflop = parametric = None
  problems = []
  try:
    isoflop = fit_isoflop(points, resamples, seed)
  except UserError as e:
    problems.append(str(e))
  try:
    parametric = fit_loss(points, resamples, seed, advance)
  except UserError as e:
    problems.append(str(e))
  if isoflop is None and parametric is None:
    raise UserError("; ".join(problems))
  compute, error = compute_law(points)
  return ScalingFit(
    points, count, compute, error, isoflop, parametric, tuple(problems),
    resamples, seed,
  )  # fmt: skip


def optima(fit: ScalingFit, flops: float) -> list[Optimum]:
  """Compute-optimal sizes at `flops`: the fits' own, then published ones.

  A parametric law of which a term is not told by its points has none; published
  laws are left out where N does not count embedding tables, as theirs does.
  """
  found = []
  if fit.isoflop is not None:
    frontier, drawn = fit.isoflop.frontier, fit.isoflop.resampled
    used = [v.flops for v in fit.isoflop.valleys if not v.problem]
    found.append(
      Optimum(
        "isoflop",
        Estimate.of(frontier.params(flops), drawn and drawn.params(flops)),
        Estimate.of(frontier.tokens(flops), drawn and drawn.tokens(flops)),
        beyond=_beyond(flops, used),
      )
    )
  if fit.parametric is not None and fit.parametric.tells_optimum:
    law, drawn = fit.parametric.law, fit.parametric.resampled
    best = law.optimum(flops, fit.compute)
    others = drawn.optimum(flops, fit.compute)
    pairs = (
      *zip(best, others),
      (law(*best), drawn(*others)),
    )
    estimates = (Estimate.of(*p) for p in pairs)
    beyond = _beyond(flops, fit.points.flops)
    found.append(Optimum("parametric", *estimates, beyond))
  return found + (published_optima(flops) if fit.count == "active" else [])


def published_optima(flops: float) -> list[Optimum]:
  """Of other models, data and tokenizers: to compare, not to use."""
  pairs = {
    "hunyuan_large": (
      HUNYUAN_LARGE.params(flops),
      HUNYUAN_LARGE.tokens(flops),
    ),
    "chinchilla": CHINCHILLA.optimum(flops),
    "chinchilla_refitted": CHINCHILLA_REFITTED.optimum(flops),
  }
  return [
    Optimum(name, Estimate.of(params), Estimate.of(tokens))
    for name, (params, tokens) in pairs.items()
  ]


def _beyond(flops: float, tried: Sequence[float]) -> float:
  """`Optimum.beyond` of a fit that rests on these budgets."""
  return float(flops / np.clip(flops, min(tried), max(tried)))


def interval(resampled: np.ndarray) -> np.ndarray:
  """(low, high) of the last axis, percentiles of CONFIDENCE."""
  tail = 50 * (1 - CONFIDENCE)
  return np.percentile(resampled, [tail, 100 - tail], axis=-1)


def power_law_estimates(
  law: PowerLaw, resampled: PowerLaw | None
) -> dict[str, Estimate]:
  """Coefficient and exponent with their intervals."""
  return {
    name: Estimate.of(
      getattr(law, name), resampled and getattr(resampled, name)
    )
    for name in ("coefficient", "exponent")
  }


def loss_law_estimates(fit: LossFit) -> dict[str, Estimate]:
  """E, A, B, alpha, beta with their intervals."""
  return {
    field.name: Estimate.of(
      getattr(fit.law, field.name), getattr(fit.resampled, field.name)
    )
    for field in dataclasses.fields(fit.law)
  }
