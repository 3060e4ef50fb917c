# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: how large a model, and how many tokens, for a compute budget.

  laws        the formulas, and published fits
  sizes       a config's family: the same shape, smaller or larger
  sweep       sizes x budgets, the runs to train; sweep_file: for moejax sweep
  points      finished runs and tables, as arrays
  isoflop     a parabola a budget, power laws of their minima
  parametric  L(N, D) = E + A / N^alpha + B / D^beta
  fit         both of them, with intervals; text, charts: for people

From a notebook:

  points = read_points(["runs/a", "runs/b", ...])
  fit = fit_points(points)
  optima(fit, 1e21)
"""

from moejax.scaling.fit import (
  Estimate,
  Optimum,
  ScalingFit,
  fit_points,
  optima,
  published_optima,
)
from moejax.scaling.isoflop import IsoFlopFit, fit_isoflop, parabola_minimum
from moejax.scaling.laws import (
  CHINCHILLA,
  CHINCHILLA_REFITTED,
  HUNYUAN_LARGE,
  SIX_ND,
  ComputeLaw,
  LossLaw,
  PowerLaw,
  hunyuan_large_flops,
)
from moejax.scaling.parametric import LossFit, fit_loss
from moejax.scaling.points import Points, read_points
from moejax.scaling.sweep import plan_points, sweep_of

__all__ = [
  "CHINCHILLA", "CHINCHILLA_REFITTED", "HUNYUAN_LARGE", "SIX_ND", "ComputeLaw",
  "Estimate", "IsoFlopFit", "LossFit", "LossLaw", "Optimum", "Points",
  "PowerLaw", "ScalingFit", "fit_isoflop", "fit_loss", "fit_points",
  "hunyuan_large_flops", "optima", "parabola_minimum", "plan_points",
  "published_optima", "read_points", "sweep_of",
]  # fmt: skip
