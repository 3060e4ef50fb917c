# SPDX-License-Identifier: Apache-2.0
"""Valleys and power laws of points whose optimum is known."""

import dataclasses

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.scaling import (
  ComputeLaw,
  LossLaw,
  Points,
  PowerLaw,
  fit_isoflop,
  parabola_minimum,
)
from moejax.scaling.fit import interval
from moejax.scaling.isoflop import budgets_of, valley_bias
from tests.scaling.synthetic import (
  BUDGETS,
  ValleyLaw,
  points_of,
  shaky_points,
  take,
)

TRUTH = PowerLaw(0.1, 0.5)


def test_a_parabolas_minimum_is_that_of_its_formula():
  """0.05 ln^2 N - 2 ln N + 22: lowest at ln N = 20, where it is 2."""
  params = np.array([1e7, 3e7, 2e8, 4e9])
  x = np.log(params)
  best, low, _ = parabola_minimum(params, 0.05 * x**2 - 2 * x + 22)
  assert np.log(best) == pytest.approx(20, rel=1e-10)
  assert low == pytest.approx(2, rel=1e-10)


def test_a_parabola_through_noise_is_polyfits():
  rng = np.random.default_rng(0)
  params = np.geomspace(1e6, 1e9, 9)
  loss = 3 + 0.04 * np.log(params / 3e7) ** 2 + 0.05 * rng.normal(size=9)
  c2, c1, c0 = np.polyfit(np.log(params), loss, 2)
  best, low, _ = parabola_minimum(params, loss)
  assert np.log(best) == pytest.approx(-c1 / (2 * c2), rel=1e-9)
  assert low == pytest.approx(c0 - c1**2 / (4 * c2), rel=1e-9)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_what_is_no_valley_has_no_minimum(sign):
  params = np.geomspace(1e6, 1e9, 5)
  best, low, _ = parabola_minimum(params, 5 + sign * np.log(params / 3e7) ** 2)
  assert np.isnan(best) and np.isnan(low)


def test_exact_points_give_the_exact_laws():
  fit = fit_isoflop(points_of(ValleyLaw(TRUTH)), 50, 0)
  params, tokens = fit.frontier.params, fit.frontier.tokens
  assert params.exponent == pytest.approx(0.5, rel=1e-9)
  assert params.coefficient == pytest.approx(0.1, rel=1e-7)
  assert tokens.exponent == pytest.approx(0.5, rel=1e-9)
  assert tokens.coefficient == pytest.approx(1 / 0.6, rel=1e-7)
  for valley, budget in zip(fit.valleys, BUDGETS):
    assert valley.problem == ""
    assert valley.loss == pytest.approx(10 * budget**-0.03, rel=1e-9)


def test_a_symmetric_loss_law_has_its_own_optimum():
  """With alpha = beta each budget's loss is even around its optimum in ln N."""
  law = LossLaw(1.7, 300.0, 500.0, 0.31, 0.31)
  fit = fit_isoflop(points_of(law), 20, 0)
  for valley in fit.valleys:
    best, tokens = law.optimum(valley.flops)
    assert valley.params == pytest.approx(best, rel=1e-9)
    assert valley.tokens == pytest.approx(tokens, rel=1e-9)


def test_the_parabolas_bias_is_what_it_does_to_exact_points():
  """None where the law is even; the whole error where it is not."""
  even = LossLaw(1.7, 300.0, 500.0, 0.31, 0.31)
  points = points_of(even)
  bias = valley_bias(points, even, fit_isoflop(points, 20, 0))
  np.testing.assert_allclose(bias, 0, atol=1e-9)

  uneven = LossLaw(1.7, 300.0, 500.0, 0.31, 0.2)
  points = points_of(uneven)
  fit = fit_isoflop(points, 20, 0)
  bias = valley_bias(points, uneven, fit)
  for valley, found in zip(fit.valleys, bias):
    true, _ = uneven.optimum(valley.flops)
    assert valley.params / true - 1 == pytest.approx(found, rel=1e-6)
  assert np.abs(bias).min() > 0.05


def test_tokens_follow_the_compute_of_the_points():
  compute = ComputeLaw(30.0, 0.92)
  law = LossLaw(1.7, 300.0, 500.0, 0.31, 0.31 / 0.92)
  fit = fit_isoflop(points_of(law, compute=compute), 20, 0)
  for valley in fit.valleys:
    best, tokens = law.optimum(valley.flops, compute)
    assert valley.params == pytest.approx(best, rel=1e-9)
    assert valley.tokens == pytest.approx(tokens, rel=1e-9)


@pytest.mark.parametrize("sizes, budgets", [(4, 3), (5, 4), (9, 9)])
def test_intervals_cover_the_truth_as_often_as_they_say(sizes, budgets):
  """Of 300 trials at 95%, 285 +- 4; 255 of 4 x 3 without the chi^2."""
  trials, covered = 300, 0
  for seed in range(trials):
    points = points_of(
      ValleyLaw(TRUTH), np.geomspace(1e18, 1e20, budgets), sizes, reach=4,
      noise=1e-3, seed=seed,
    )  # fmt: skip
    fit = fit_isoflop(points, 300, seed)
    low, high = interval(fit.resampled.params.exponent)
    covered += low <= 0.5 <= high
  assert 0.91 <= covered / trials <= 0.98


def test_the_same_seed_gives_the_same_interval():
  points = points_of(ValleyLaw(TRUTH), noise=1e-3)
  first, again, other = (
    fit_isoflop(points, 50, seed).resampled.params for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first.exponent, again.exponent)
  assert (first.exponent != other.exponent).all()


@pytest.mark.parametrize(
  "keep, said",
  [
    (
      slice(4, None),
      "valley below the smallest size tried; try models of less",
    ),
    (slice(None, 3), "valley above the largest size tried; try models of more"),
  ],
)
def test_a_valley_outside_is_said_and_not_used(keep, said):
  points = points_of(ValleyLaw(TRUTH))
  kept = np.r_[np.arange(7)[keep], np.arange(7, 35)]
  fit = fit_isoflop(take(points, kept), 20, 0)
  first = fit.valleys[0]
  assert said in first.problem
  assert first.params is first.tokens is first.loss is None
  assert [v.problem for v in fit.valleys[1:]] == [""] * 4
  assert fit.frontier.params.exponent == pytest.approx(0.5, rel=1e-9)
  assert fit.valley_params_RG.shape == (20, 4)


def test_a_ridge_is_said():
  points = points_of(ValleyLaw(TRUTH))
  loss = points.loss.copy()
  loss[:7] = 10 - loss[:7]
  fit = fit_isoflop(dataclasses.replace(points, loss=loss), 20, 0)
  assert fit.valleys[0].problem.startswith(
    "its parabola has no minimum; try models of"
  )


def test_too_few_budgets_or_sizes():
  law = ValleyLaw(TRUTH)
  with pytest.raises(UserError, match="1 of 1 budgets .* 2 are needed"):
    fit_isoflop(points_of(law, (1e18,)), 20, 0)
  with pytest.raises(UserError, match="2 sizes; a parabola needs 3"):
    fit_isoflop(points_of(law, sizes=2), 20, 0)


def test_points_without_budgets_are_not_one_budget():
  """Compute that runs on in steps of a tenth has no valleys to fit."""
  points = points_of(ValleyLaw(TRUTH), np.geomspace(1e18, 1e20, 50), sizes=1)
  with pytest.raises(UserError, match="no one budget"):
    fit_isoflop(points, 20, 0)


def test_points_of_a_budget_may_be_some_percent_apart():
  points = points_of(ValleyLaw(TRUTH))
  shifted = points.flops * np.tile(np.linspace(0.96, 1.04, 7), 5)
  groups = budgets_of(dataclasses.replace(points, flops=shifted))
  assert [sorted(g) for g in groups] == np.arange(35).reshape(5, 7).tolist()


def test_three_sizes_have_no_interval():
  fit = fit_isoflop(points_of(ValleyLaw(TRUTH), sizes=3), 20, 0)
  assert fit.resampled is None
  assert fit.frontier.params.exponent == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
  "budgets, kept", [(2, (25, 75)), (3, (0, 49)), (9, (0, 3))]
)
def test_where_few_resamples_have_valleys_there_is_no_interval(budgets, kept):
  """Half of each budget's, so 2^-G of G budgets: at nine maybe none at all."""
  points = shaky_points(np.geomspace(1e18, 1e20, budgets))
  for seed in range(3):
    fit = fit_isoflop(points, 200, seed)
    assert fit.frontier.params.exponent == pytest.approx(0.5, rel=1e-6)
    left = 200 - fit.failed
    assert kept[0] <= left / 2 <= kept[1]
    assert (fit.resampled is None) == (fit.valley_params_RG is None)
    assert (fit.resampled is None) == (left < 100)


def test_an_interval_is_of_the_resamples_that_are_left():
  points = shaky_points((1e18, 1e19), curvature=2e-3)
  fit = fit_isoflop(points, 200, 0)
  assert 0 < fit.failed < 100
  assert fit.resampled.params.exponent.shape == (200 - fit.failed,)
  assert fit.valley_params_RG.shape == (200 - fit.failed, 2)


def test_repeats_of_a_size_count_as_points():
  points = points_of(ValleyLaw(TRUTH), sizes=3)
  twice = take(points, np.r_[np.arange(15), np.arange(15)])
  assert isinstance(twice, Points)
  fit = fit_isoflop(twice, 20, 0)
  assert fit.resampled is not None
  assert [v.num_points for v in fit.valleys] == [6] * 5
  assert fit.frontier.tokens.exponent == pytest.approx(0.5, rel=1e-9)
