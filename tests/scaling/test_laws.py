# SPDX-License-Identifier: Apache-2.0
"""The formulas, against their papers and against plain minimisation."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from moejax.scaling import (
  CHINCHILLA,
  CHINCHILLA_REFITTED,
  HUNYUAN_LARGE,
  SIX_ND,
  ComputeLaw,
  LossLaw,
  hunyuan_large_flops,
)


def test_hunyuan_larges_sizes_and_compute_are_those_published():
  """Section 2.3.1 of arXiv:2411.02265: 58.1B active, 5.6T, both of 3.1e24."""
  assert hunyuan_large_flops(58.1e9, 5.6e12) == pytest.approx(3.1e24, rel=0.01)
  assert HUNYUAN_LARGE.params(3.1e24) == pytest.approx(58.1e9, rel=0.01)
  assert HUNYUAN_LARGE.tokens(3.1e24) == pytest.approx(5.6e12, rel=0.01)
  # By 6 N D it would be a third less.
  assert SIX_ND.flops(58.1e9, 5.6e12) < 2e24


@pytest.mark.parametrize("params, share", [(10e6, 0.71), (1.2e6, 0.95)])
def test_the_constants_share_is_what_the_docs_say(params, share):
  constant = hunyuan_large_flops(0, 1) / hunyuan_large_flops(params, 1)
  assert constant == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
  "law, exponent, places",
  # Table 2 of arXiv:2203.15556 (0.46, of numbers less rounded); section 4 of
  # arXiv:2404.10102 (0.5126, of numbers not rounded).
  [(CHINCHILLA, 0.46, 0.01), (CHINCHILLA_REFITTED, 0.5126, 2e-4)],
)
def test_chinchillas_exponents_are_those_published(law, exponent, places):
  small, _ = law.optimum(1e18)
  large, _ = law.optimum(1e24)
  found = np.log(large / small) / np.log(1e6)
  assert found == pytest.approx(exponent, abs=places)


@pytest.mark.parametrize("law", [CHINCHILLA, CHINCHILLA_REFITTED])
@pytest.mark.parametrize("compute", [SIX_ND, ComputeLaw(40.0, 0.9)])
@pytest.mark.parametrize("flops", [1e15, 5.76e23])
def test_the_optimum_is_the_lowest_loss_on_its_budget(law, compute, flops):
  def loss(log_params):
    params = np.exp(log_params)
    return law(params, compute.tokens(flops, params))

  bounds = (np.log(1e3), np.log(1e15))
  lowest = minimize_scalar(
    loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}
  )
  params, tokens = law.optimum(flops, compute)
  assert compute.flops(params, tokens) == pytest.approx(flops, rel=1e-12)
  # A minimum's place is known to the root of the numbers' precision.
  assert np.log(params) == pytest.approx(lowest.x, abs=1e-6)
  assert law(params, tokens) <= lowest.fun * (1 + 1e-14)


def test_the_optimum_at_6nd_is_equation_4():
  law, flops = CHINCHILLA, 5.76e23
  a = law.beta / (law.alpha + law.beta)
  g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
  params, tokens = law.optimum(flops)
  assert params == pytest.approx(g * (flops / 6) ** a, rel=1e-12)
  assert tokens == pytest.approx((flops / 6) ** (1 - a) / g, rel=1e-12)


def test_a_law_of_arrays_is_a_law_of_each():
  laws = LossLaw(*(np.array([x, 1.1 * x]) for x in (1.7, 400, 410, 0.34, 0.28)))
  params, tokens = laws.optimum(1e20)
  for i in range(2):
    one = LossLaw(
      *(getattr(laws, n)[i] for n in ("E", "A", "B", "alpha", "beta"))
    )
    assert params[i] == pytest.approx(one.optimum(1e20)[0], rel=1e-12)
    assert laws(params, tokens)[i] == pytest.approx(
      one(params[i], tokens[i]), rel=1e-12
    )
