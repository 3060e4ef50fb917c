# SPDX-License-Identifier: Apache-2.0
"""IsoFLOP valleys: one parabola a compute budget, power laws of their minima.

Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556), also Hunyuan-Large's
(arXiv:2411.02265). A valley outside of the sizes that were tried is said to be
there, and used for nothing.

Suffixes: `P` points of all budgets, `G` budgets, `R` resamples.
"""

import dataclasses

import numpy as np

from moejax.errors import UserError
from moejax.scaling.laws import Frontier, LossLaw, PowerLaw
from moejax.scaling.points import Points, compute_law

# Whole steps put a budget's points a few per cent apart; budgets themselves
# are apart by much more.
GAP = 1.1
SPREAD = 1.2
ENOUGH = 0.5  # of the resamples: what is left of fewer is no interval


@dataclasses.dataclass(frozen=True)
class Valley:
  """The parabola of one budget, L = c0 + c1 x + c2 x^2 in x = ln(N / centre).

  Attributes:
    flops: geometric mean of the points' C.
    sizes: smallest and largest N tried.
    num_points: of this budget.
    centre: geometric mean of the points' N.
    coefficients: (c0, c1, c2); None if there are too few sizes.
    params, tokens, loss: of its minimum; None unless `problem` is empty.
    problem: why it has no minimum to use; empty if it has.
  """

  flops: float
  sizes: tuple[float, float]
  num_points: int
  centre: float
  coefficients: tuple[float, float, float] | None
  params: float | None
  tokens: float | None
  loss: float | None
  problem: str


@dataclasses.dataclass(frozen=True)
class IsoFlopFit:
  """All valleys, and the power laws through those that can be used.

  Attributes:
    valleys: by budget, problems included.
    frontier: N_opt(C) and D_opt(C).
    resampled: the same with [R] coefficients and exponents; None where no
      budget has a fourth point to tell the noise from, or where fewer than
      ENOUGH of the resamples have all valleys.
    failed: resamples without a valley in each budget, left out of `resampled`.
    valley_params_RG: N_opt of each budget that is used, by resample; None where
      `resampled` is.
  """

  valleys: list[Valley]
  frontier: Frontier
  resampled: Frontier | None
  failed: int
  valley_params_RG: np.ndarray | None


def parabola_minimum(
  params: np.ndarray, loss: np.ndarray
) -> tuple[float, float, tuple[float, float, float]]:
  """Least-squares parabola of loss over ln N.

  Returns:
    (N at its minimum, loss there, (c0, c1, c2) around the mean of ln N); NaN
    for the first two if c2 is not positive.
  """
  x = np.log(params) - np.log(params).mean()
  c0, c1, c2 = np.linalg.lstsq(_powers(x), loss, rcond=None)[0]
  vertex = _vertex(c1, c2)
  low = c0 + c1 * vertex + c2 * vertex**2
  best = _geometric_mean(params) * np.exp(vertex)
  return float(best), float(low), (float(c0), float(c1), float(c2))


def fit_isoflop(points: Points, resamples: int, seed: int) -> IsoFlopFit:
  """Valleys of all budgets, and power laws through them with resamples.

  Resampled are the parabolas' residuals, pooled over budgets and divided by
  the root of 1 - 3 / n, on the sizes that were tried: of five sizes drawn with
  replacement, a third of the draws have no parabola. Each resample is scaled by
  a draw of sqrt(dof / chi^2), because the noise itself is known only from these
  residuals.

  Raises:
    UserError: fewer than two budgets have a valley within the sizes tried.
  """
  groups = budgets_of(points)
  valleys = [_valley(points, group) for group in groups]
  used = [i for i, valley in enumerate(valleys) if not valley.problem]
  if len(used) < 2:
    raise UserError(_too_few(valleys, used))
  log_flops = np.log([valleys[i].flops for i in used])
  frontier = Frontier(
    *(
      _power_law(log_flops, np.log([getattr(valleys[i], name) for i in used]))
      for name in ("params", "tokens")
    )
  )
  drawn = _resample(points, [groups[i] for i in used], resamples, seed)
  if drawn is None:
    return IsoFlopFit(valleys, frontier, None, 0, None)
  params_RG, tokens_RG = drawn
  whole = np.isfinite(params_RG).all(1)
  failed = int((~whole).sum())
  if whole.mean() < ENOUGH:
    return IsoFlopFit(valleys, frontier, None, failed, None)
  params_RG, tokens_RG = params_RG[whole], tokens_RG[whole]
  resampled = Frontier(
    _power_law(log_flops, np.log(params_RG).T),
    _power_law(log_flops, np.log(tokens_RG).T),
  )
  return IsoFlopFit(valleys, frontier, resampled, failed, params_RG)


def valley_bias(points: Points, law: LossLaw, fit: IsoFlopFit) -> list[float]:
  """How far off parabolas put the valleys of a law that is known.

  A law's own curve is no parabola where alpha and beta differ, and the wider
  and the less even the sizes are around the valley, the more (see
  arXiv:2603.22339).

  Returns:
    For each budget in use: N_opt by a parabola through the law's loss at the
    same N and D, over the law's own N_opt of that budget, minus 1.
  """
  compute, _ = compute_law(points)
  found = []
  for valley, group in zip(fit.valleys, budgets_of(points)):
    if not valley.problem:
      params, tokens = points.params[group], points.tokens[group]
      best, _, _ = parabola_minimum(params, law(params, tokens))
      found.append(best / law.optimum(valley.flops, compute)[0] - 1)
  return found


def budgets_of(points: Points) -> list[np.ndarray]:
  """Indices of the points of each budget, by rising compute."""
  order = np.argsort(points.flops, kind="stable")
  ratios = points.flops[order][1:] / points.flops[order][:-1]
  return np.split(order, np.flatnonzero(ratios > GAP) + 1)


def _valley(points: Points, group: np.ndarray) -> Valley:
  params, loss = points.params[group], points.loss[group]
  flops = points.flops[group]
  best, low, coefficients = np.nan, np.nan, None
  if flops.max() / flops.min() > SPREAD:
    problem = (
      f"its points' compute runs from {flops.min():.3g} to {flops.max():.3g}: "
      "no one budget"
    )
  elif len(np.unique(params)) < 3:
    problem = f"{len(np.unique(params))} sizes; a parabola needs 3"
  else:
    best, low, coefficients = parabola_minimum(params, loss)
    problem = _why_no_minimum(params, loss, coefficients[2], best)
  found = not problem
  return Valley(
    flops=_geometric_mean(flops),
    sizes=(float(params.min()), float(params.max())),
    num_points=len(group),
    centre=_geometric_mean(params),
    coefficients=coefficients,
    params=float(best) if found else None,
    tokens=float(_tokens_at(points, group, best)) if found else None,
    loss=float(low) if found else None,
    problem=problem,
  )


def _why_no_minimum(
  params: np.ndarray, loss: np.ndarray, curvature: float, best: float
) -> str:
  lowest = params[loss.argmin()]
  if curvature > 0 and params.min() <= best <= params.max():
    return ""
  start = "its parabola has no minimum"
  if curvature > 0:
    lowest = best
    end = "below the smallest" if best < params.min() else "above the largest"
    start = f"valley {end} size tried"
  if lowest <= params.min():
    return f"{start}; try models of less than {params.min():.3g}"
  if lowest >= params.max():
    return f"{start}; try models of more than {params.max():.3g}"
  return f"{start}; try a wider range of sizes"


def _too_few(valleys: list[Valley], used: list[int]) -> str:
  reasons = "; ".join(
    f"{valley.flops:.3g} FLOPs: {valley.problem}"
    for valley in valleys
    if valley.problem
  )
  return (
    f"IsoFLOP fit: {len(used)} of {len(valleys)} budgets with a valley within "
    f"the sizes tried, 2 are needed{reasons and f' ({reasons})'}"
  )


def _tokens_at(points: Points, group: np.ndarray, params: np.ndarray):
  """D at N in one budget: ln D is interpolated over ln N (exact for 6 N D).

  Beyond the sizes tried, where resamples may lie, the ends' slopes go on.
  """
  x, index = np.unique(np.log(points.params[group]), return_inverse=True)
  y = np.bincount(index, np.log(points.tokens[group])) / np.bincount(index)
  at = np.log(params)
  i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
  slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
  return np.exp(y[i] + slope * (at - x[i]))


def _power_law(log_x_G: np.ndarray, log_y_G: np.ndarray) -> PowerLaw:
  """Least squares in logarithms; `log_y_G` may be [G] or [G, R]."""
  x = log_x_G - log_x_G.mean()
  exponent = x @ log_y_G / (x @ x)
  return PowerLaw(np.exp(log_y_G.mean(0) - exponent * log_x_G.mean()), exponent)


def _resample(
  points: Points, groups: list[np.ndarray], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
  """N_opt and D_opt, [R, G], of parabolas through fit plus drawn residuals.

  A parabola without a minimum gives NaN; None where there are no residuals.
  """
  designs, fits, residuals = [], [], []
  for group in groups:
    log_params = np.log(points.params[group])
    design = _powers(log_params - log_params.mean())
    fit = design @ np.linalg.lstsq(design, points.loss[group], rcond=None)[0]
    designs.append(design)
    fits.append(fit)
    n = len(group)
    if n > 3:
      scale = np.sqrt(n / (n - 3))
      residuals.append((points.loss[group] - fit) * scale)
  if not residuals:
    return None
  pool = np.concatenate(residuals)
  dof = sum(len(r) - 3 for r in residuals)
  rng = np.random.default_rng(seed)
  noise_R = np.sqrt(dof / rng.chisquare(dof, resamples))
  found = []
  for group, design, fit in zip(groups, designs, fits):
    drawn = rng.choice(pool, (resamples, len(group))) * noise_R[:, None]
    _, c1, c2 = np.linalg.pinv(design) @ (fit + drawn).T
    centre = _geometric_mean(points.params[group])
    params = centre * np.exp(_vertex(c1, c2))
    found.append((params, _tokens_at(points, group, params)))
  params_RG, tokens_RG = (np.stack(part, 1) for part in zip(*found))
  return params_RG, tokens_RG


def _vertex(c1: np.ndarray, c2: np.ndarray) -> np.ndarray:
  """Where a parabola is lowest, in ln N; NaN where it is not."""
  vertex = np.where(c2 > 0, -c1 / (2 * np.where(c2 > 0, c2, 1)), np.nan)
  # Nearly straight lines: beyond every size is far enough, and overflows not.
  return np.clip(vertex, -30, 30)


def _powers(x: np.ndarray) -> np.ndarray:
  return np.stack([np.ones_like(x), x, x**2], 1)


def _geometric_mean(x: np.ndarray) -> float:
  return float(np.exp(np.log(x).mean()))
