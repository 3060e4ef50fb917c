# SPDX-License-Identifier: Apache-2.0
"""The parametric loss L(N, D) = E + A / N^alpha + B / D^beta, fitted.

Approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556): the Huber loss of
ln L - logsumexp(ln A - alpha ln N, ln B - beta ln D, ln E), minimised from many
starts. Three things differ, and none moves the optimum. The sum is divided by
the square of Huber's width, because the original's stopped early on its scale
(Besiroglu et al. 2024, arXiv:2404.10102). Starts are not a grid over all five
numbers but over (alpha, beta): the others then follow by linear least squares
(variable projection, as in arXiv:2603.22339). And BFGS stands for L-BFGS: five
numbers need no limited memory, and scipy's code for that keeps threads busy on
matrices of five rows, at twenty times the cost on a machine that is shared.

Suffixes: `P` points, `R` resamples.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.errors import UserError
from moejax.scaling.laws import LossLaw
from moejax.scaling.points import Points

HUBER_WIDTH = 1e-3  # in ln L, as published
MIN_POINTS = 8
STARTS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.4)  # of alpha and of beta
NUM_STARTS = 12  # the best of these pairs go on to BFGS
EXPONENTS = (0.01, 3.0)


@dataclasses.dataclass(frozen=True)
class LossFit:
  """The law, and what is known of its certainty.

  Attributes:
    law: the best of all starts.
    resampled: the same with [R] values each, of points drawn with replacement.
    predicted: L of the law at the points, [P].
    agreeing: starts that ended at the same optimum, of `starts`.
    notes: numbers that the points do not determine.
    tells_optimum: whether both terms are told; E matters to no optimum.
  """

  law: LossLaw
  resampled: LossLaw
  predicted: np.ndarray
  agreeing: int
  starts: int
  notes: tuple[str, ...]
  tells_optimum: bool


def fit_loss(
  points: Points,
  resamples: int,
  seed: int,
  advance: Callable[[], None] = lambda: None,
) -> LossFit:
  """Fits the law to all points, and again to `resamples` draws of them.

  Args:
    points: sizes and lengths of which both vary.
    resamples: draws of as many points with replacement.
    seed: of the draws.
    advance: called after each draw.

  Raises:
    UserError: fewer than eight points, three sizes or three lengths.
  """
  _check(points)
  problem = _Problem(points)
  starts = problem.starts()[:NUM_STARTS]
  ends = sorted(
    (problem.minimise(start) for start in starts), key=lambda x: x[0]
  )
  cost, best = ends[0]
  agreeing = sum(other < cost * (1 + 1e-3) + 1e-9 for other, _ in ends)
  law = problem.law(best)
  rng = np.random.default_rng(seed)
  found = []
  again = (best,) if agreeing == len(starts) else (best, *starts[:2])
  for _ in range(resamples):
    drawn = rng.integers(len(points), size=len(points))
    weights = np.bincount(drawn, minlength=len(points)).astype(float)
    tried = [problem.minimise(s, weights) for s in again]
    found.append(min(tried, key=lambda x: x[0])[1])
    advance()
  resampled = problem.law(np.array(found).reshape(-1, 5).T)
  predicted = law(points.params, points.tokens)
  notes = tuple(problem.undetermined(best))
  tells = all(note.startswith("E ") for note in notes)
  return LossFit(law, resampled, predicted, agreeing, len(starts), notes, tells)


def _check(points: Points) -> None:
  sizes, lengths = (
    len(np.unique(np.round(np.log(x), 3)))
    for x in (points.params, points.tokens)
  )
  if len(points) < MIN_POINTS or min(sizes, lengths) < 3:
    raise UserError(
      f"parametric fit: {len(points)} points of {sizes} sizes and {lengths} "
      f"lengths; its five numbers need {MIN_POINTS} points, 3 sizes and 3 "
      "lengths"
    )


class _Problem:
  """The objective over (ln A', ln B', ln E, alpha, beta).

  A' and B' are the terms' values at the mean of ln N and of ln D, which no
  exponent changes: without this A and alpha move together, and BFGS crawls.
  """

  def __init__(self, points: Points):
    self.centre_n = np.log(points.params).mean()
    self.centre_d = np.log(points.tokens).mean()
    self.n_P = np.log(points.params) - self.centre_n
    self.d_P = np.log(points.tokens) - self.centre_d
    self.log_loss_P = np.log(points.loss)
    low = self.log_loss_P.min()
    term = (low - 16, low + 3)
    self.bounds = [term, term, (low - 16, low), EXPONENTS, EXPONENTS]

  def law(self, theta: np.ndarray) -> LossLaw:
    """The law in its own units; `theta` may be [5] or [5, R]."""
    a, b, e, alpha, beta = theta
    log_a, log_b = a + alpha * self.centre_n, b + beta * self.centre_d
    return LossLaw(np.exp(e), np.exp(log_a), np.exp(log_b), alpha, beta)

  def terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the three terms, [3, P], and of their sum, [P]."""
    a, b, e, alpha, beta = theta
    terms = np.stack(
      [a - alpha * self.n_P, b - beta * self.d_P, np.full_like(self.n_P, e)]
    )
    return terms, np.logaddexp.reduce(terms)

  def cost(
    self, theta: np.ndarray, weights: np.ndarray
  ) -> tuple[float, np.ndarray]:
    """Huber loss over its squared width, and its gradient."""
    terms, log_law_P = self.terms(theta)
    share = np.exp(terms - log_law_P)
    z = (log_law_P - self.log_loss_P) / HUBER_WIDTH
    clipped = np.clip(z, -1, 1)
    slope = weights * clipped / HUBER_WIDTH
    grad_a, grad_b, grad_e = share @ slope
    grad_alpha = -(share[0] * self.n_P) @ slope
    grad_beta = -(share[1] * self.d_P) @ slope
    gradient = np.array([grad_a, grad_b, grad_e, grad_alpha, grad_beta])
    return weights @ (clipped * (z - clipped / 2)), gradient

  def starts(self) -> list[np.ndarray]:
    """Optima for given exponents, the lowest cost first."""
    from scipy.optimize import nnls

    loss_P = np.exp(self.log_loss_P)
    ones = np.ones_like(loss_P)
    found = []
    for alpha in STARTS:
      for beta in STARTS:
        terms = [np.exp(-alpha * self.n_P), np.exp(-beta * self.d_P), ones]
        factors, _ = nnls(np.stack(terms, 1), loss_P)
        logs = np.log(np.maximum(factors, 1e-3 * loss_P.min()))
        theta = np.array([*logs, alpha, beta])
        theta = np.clip(theta, *np.array(self.bounds).T)
        found.append((self.cost(theta, ones)[0], theta))
    return [theta for _, theta in sorted(found, key=lambda x: x[0])]

  def minimise(
    self, start: np.ndarray, weights: np.ndarray | None = None
  ) -> tuple[float, np.ndarray]:
    """Cost and place of the optimum that BFGS finds from `start`.

    Over u in theta = start + W u, where W makes Gauss and Newton's matrix at
    the start the identity: a third of the steps.
    """
    from scipy.optimize import minimize

    if weights is None:
      weights = np.ones_like(self.n_P)
    to_theta = self.whitening(start)

    def cost(u: np.ndarray) -> tuple[float, np.ndarray]:
      value, gradient = self.cost(start + to_theta @ u, weights)
      return value, to_theta.T @ gradient

    done = minimize(
      cost, np.zeros(5), method="BFGS", jac=True,
      options={"gtol": 1e-7, "maxiter": 2000},
    )  # fmt: skip
    theta = np.clip(start + to_theta @ done.x, *np.array(self.bounds).T)
    return self.cost(theta, weights)[0], theta

  def whitening(self, theta: np.ndarray) -> np.ndarray:
    """W with W W^T = (J^T J / width^2)^-1, J the residuals' derivatives."""
    terms, log_law_P = self.terms(theta)
    share = np.exp(terms - log_law_P)
    slopes = [*share, -share[0] * self.n_P, -share[1] * self.d_P]
    jacobian = np.stack(slopes, 1) / HUBER_WIDTH
    matrix = jacobian.T @ jacobian
    # A term that is nearly nothing would have no inverse.
    matrix += 1e-8 * np.trace(matrix) * np.eye(5)
    return np.linalg.inv(np.linalg.cholesky(matrix)).T

  def undetermined(self, theta: np.ndarray) -> list[str]:
    """What these points do not tell: vanishing terms, bounds of the search."""
    terms, log_law_P = self.terms(theta)
    largest = np.exp(terms - log_law_P).max(1)
    notes = [
      f"{name} is less than a thousandth of each loss: these points do not "
      "tell it"
      for name, share in zip(("A's term", "B's term", "E"), largest)
      if share < 1e-3
    ]
    low, high = EXPONENTS
    return notes + [
      f"{name} ended at the edge of the search, {value:.3g}: these points do "
      "not tell it"
      for name, value in zip(("alpha", "beta"), theta[3:])
      if min(value - low, high - value) < 1e-3
    ]
