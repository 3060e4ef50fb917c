# SPDX-License-Identifier: Apache-2.0
"""Points of a known law."""

import dataclasses

import numpy as np

from moejax.scaling import SIX_ND, Points, PowerLaw

BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)


def points_of(
  law, budgets=BUDGETS, sizes=7, reach=8.0, noise=0.0, seed=0, compute=SIX_ND
):
  """IsoFLOP points of a loss law, sizes around each budget's own optimum.

  Args:
    law: loss of N and D; with `optimum`.
    budgets: C.
    sizes: a budget, evenly from N_opt / reach to N_opt * reach in ln N.
    reach: see above.
    noise: relative, normal.
    seed: of the noise.
    compute: C of N and D.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for budget in budgets:
    best, _ = law.optimum(budget, compute)
    for params in np.geomspace(best / reach, best * reach, sizes):
      tokens = compute.tokens(budget, params)
      loss = law(params, tokens) * np.exp(noise * rng.normal())
      rows.append((params, tokens, budget, loss))
  names = tuple(f"p{i}" for i in range(len(rows)))
  return Points(names, *np.array(rows).T)


def take(points, indices):
  """Some of the points."""
  names = tuple(points.names[i] for i in indices)
  columns = (points.params, points.tokens, points.flops, points.loss)
  return Points(names, *(column[indices] for column in columns))


def shaky_points(budgets, curvature=1e-6):
  """Valleys at 0.1 C^0.5 that are far less deep than their noise is high.

  Of four sizes, 1, -3, 3, -1 is what no parabola takes: the valleys stay where
  they are, and resamples bend up or down by chance.
  """
  points = points_of(ValleyLaw(PowerLaw(0.1, 0.5), curvature), budgets, 4)
  noise = np.tile([1e-3, -3e-3, 3e-3, -1e-3], len(budgets))
  return dataclasses.replace(points, loss=points.loss + noise)


class ValleyLaw:
  """A loss that is a parabola in ln(N / N_opt), for any budget at 6 N D."""

  def __init__(self, frontier, curvature=0.05):
    self.frontier, self.curvature = frontier, curvature

  def optimum(self, flops, compute=SIX_ND):
    params = self.frontier(flops)
    return params, compute.tokens(flops, params)

  def __call__(self, params, tokens):
    flops = SIX_ND.flops(params, tokens)
    x = np.log(params / self.frontier(flops))
    return 10 * flops**-0.03 + self.curvature * x**2
