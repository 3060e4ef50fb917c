# SPDX-License-Identifier: Apache-2.0
"""The parametric law: known coefficients, and other minimisers."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import check_grad, least_squares

from moejax.errors import UserError
from moejax.scaling import CHINCHILLA, CHINCHILLA_REFITTED, LossLaw, fit_loss
from moejax.scaling.fit import interval
from moejax.scaling.parametric import HUBER_WIDTH, _Problem
from tests.scaling.synthetic import points_of, take

SMALL = LossLaw(1.1, 30.0, 90.0, 0.22, 0.31)
FIELDS = [field.name for field in dataclasses.fields(LossLaw)]


@pytest.mark.parametrize(
  "law, budgets",
  [
    (CHINCHILLA, (1e18, 1e19, 1e20)),
    (CHINCHILLA_REFITTED, (6e18, 1e20, 3e21)),
    (SMALL, (1e12, 3e12, 1e13)),
  ],
)
def test_exact_points_give_the_exact_coefficients(law, budgets):
  fit = fit_loss(points_of(law, budgets), 0, 0)
  for name in FIELDS:
    found, true = getattr(fit.law, name), getattr(law, name)
    assert found == pytest.approx(true, rel=1e-6), name
  assert fit.agreeing == fit.starts
  assert fit.notes == ()


def test_the_gradient_is_that_of_the_cost():
  problem = _Problem(points_of(CHINCHILLA, noise=2e-3))
  rng = np.random.default_rng(0)
  weights = rng.integers(0, 3, 35).astype(float)
  theta = problem.starts()[0] + 0.01 * rng.normal(size=5)
  cost = lambda x: problem.cost(x, weights)[0]
  slope = lambda x: problem.cost(x, weights)[1]
  size = np.linalg.norm(slope(theta))
  assert check_grad(cost, slope, theta, epsilon=1e-7) < 1e-4 * size


def test_noisy_points_give_scipys_huber_optimum():
  """Its trust-region method on equation 3 as printed: other code, other way."""
  points = points_of(CHINCHILLA, noise=3e-3, seed=1)
  n, d, loss = (np.log(x) for x in (points.params, points.tokens, points.loss))

  def residuals(theta):
    a, b, e, alpha, beta = theta
    law = np.exp(a - alpha * n) + np.exp(b - beta * d) + np.exp(e)
    return np.log(law) - loss

  start = [np.log(400), np.log(400), np.log(1.7), 0.34, 0.28]
  other = least_squares(
    residuals, start, loss="huber", f_scale=HUBER_WIDTH, x_scale="jac",
    xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=10_000,
  )  # fmt: skip
  law = fit_loss(points, 0, 0).law
  ours = [np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]

  def cost(theta):
    z = np.abs(residuals(theta)) / HUBER_WIDTH
    return np.where(z <= 1, z**2 / 2, z - 0.5).sum()

  assert cost(ours) <= cost(other.x) * (1 + 1e-6)
  np.testing.assert_allclose(ours, other.x, rtol=2e-3)


def test_a_run_that_failed_moves_little():
  points = points_of(CHINCHILLA, noise=1e-3)
  loss = points.loss.copy()
  loss[11] *= 1.3
  fit = fit_loss(dataclasses.replace(points, loss=loss), 0, 0)
  assert fit.law.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.05)
  assert fit.law.beta == pytest.approx(CHINCHILLA.beta, rel=0.05)
  assert loss[11] / fit.predicted[11] == pytest.approx(1.3, rel=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say():
  """Of 20 trials at 95%, one in 75 would leave less than 17."""
  covered = np.zeros(3)
  for seed in range(20):
    points = points_of(CHINCHILLA, noise=2e-3, seed=seed)
    drawn = fit_loss(points, 60, seed).resampled
    for i, (found, true) in enumerate(
      (
        (drawn.alpha, CHINCHILLA.alpha),
        (drawn.E, CHINCHILLA.E),
        (drawn.optimum(1e22)[0], CHINCHILLA.optimum(1e22)[0]),
      )
    ):
      low, high = interval(found)
      assert high < 3 * low
      covered[i] += low <= true <= high
  assert (covered >= 17).all(), covered


def test_an_entropy_that_the_points_do_not_tell_is_said():
  law = LossLaw(1e-12, 30.0, 90.0, 0.22, 0.31)
  fit = fit_loss(points_of(law), 0, 0)
  assert len(fit.notes) == 1
  assert fit.notes[0].startswith("E is less than a thousandth")
  assert fit.tells_optimum


def test_points_of_one_side_tell_no_optimum():
  """Where models are so large that only the tokens matter."""
  law = LossLaw(1.7, 0.0, 90.0, 0.3, 0.31)
  points = points_of(LossLaw(1.7, 30.0, 90.0, 0.3, 0.31), noise=1e-3)
  loss = points.loss - 30 / points.params**0.3
  np.testing.assert_allclose(loss, law(points.params, points.tokens), rtol=0.01)
  fit = fit_loss(dataclasses.replace(points, loss=loss), 20, 0)
  assert not fit.tells_optimum
  assert "A's term is less than a thousandth" in " ".join(fit.notes)
  params, tokens = fit.resampled.optimum(1e20)
  assert np.isfinite(params).all() and np.isfinite(tokens).all()


def test_each_draw_is_told_and_the_same_seed_draws_the_same():
  points = points_of(SMALL, noise=1e-3, sizes=5)
  told = []
  first = fit_loss(points, 5, 3, lambda: told.append(1)).resampled
  again = fit_loss(points, 5, 3).resampled
  assert len(told) == 5
  np.testing.assert_array_equal(first.alpha, again.alpha)
  assert len(set(first.alpha)) == 5


@pytest.mark.parametrize(
  "kept, said",
  [
    (slice(0, 7), "7 points of 7 sizes and 7 lengths"),
    (slice(0, 35, 7), "5 points"),
  ],
)
def test_too_few_points(kept, said):
  points = points_of(CHINCHILLA)
  with pytest.raises(UserError, match=said):
    fit_loss(take(points, np.arange(35)[kept]), 0, 0)


def test_one_size_is_not_enough():
  points = points_of(CHINCHILLA)
  same = dataclasses.replace(points, params=np.full(35, 1e8))
  with pytest.raises(UserError, match="35 points of 1 sizes"):
    fit_loss(same, 0, 0)
