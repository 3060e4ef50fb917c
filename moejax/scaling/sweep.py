# SPDX-License-Identifier: Apache-2.0
"""The IsoFLOP sweep of a config's family: sizes x budgets, tokens by budget."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from moejax.config import Config
from moejax.errors import ConfigError, UserError
from moejax.models import count, train_flops_per_token
from moejax.scaling.laws import SIX_ND, hunyuan_large_flops
from moejax.scaling.sizes import Size, find_size, with_options

FEWEST_STEPS = 10  # whole steps then meet a budget within a twentieth


@dataclasses.dataclass(frozen=True)
class PlannedPoint:
  """One run of the sweep.

  Attributes:
    name: unique within the sweep; fits a folder's name.
    options: what the run sets in the config, by dotted path.
    config: the whole config with them.
    params: N, of the kind that was asked for.
    active_params: N with embedding tables, whatever was asked for.
    tokens: D, in whole steps.
    flops: C by the config's own count.
    budget: FLOPs that were asked for.
    shape: its width per layer over the config's.
  """

  name: str
  options: dict[str, Any]
  config: Config
  params: int
  active_params: int
  tokens: int
  flops: float
  budget: float
  shape: float

  @property
  def steps(self) -> int:
    return self.config.train.num_steps

  @property
  def six_nd(self) -> float:
    return SIX_ND.flops(self.active_params, self.tokens)

  @property
  def hunyuan_large(self) -> float:
    return hunyuan_large_flops(self.active_params, self.tokens)


def plan_points(
  config: Config,
  budgets: list[float],
  sizes: list[float],
  kind: str = "active",
  advance: Callable[[], None] = lambda: None,
) -> list[PlannedPoint]:
  """All sizes at all budgets, by budget, then size.

  D is the budget over the FLOPs per token that the size's config has, rounded
  to whole steps. Warm-up and decay take the same share of every run as of the
  config's own, in whole steps; the rest of the config stays, the peak learning
  rate too.

  Args:
    config: the family, see `moejax.scaling.sizes`.
    budgets: C, in FLOPs.
    sizes: N.
    kind: what N counts, `active` or `non-embedding`.
    advance: called when a size is found.

  Raises:
    UserError: a size that the family has not, two that are one, budgets that
      give the same steps, or fewer than FEWEST_STEPS of them.
    ConfigError: a point that the config's other options do not allow, or a
      config with phases, whose lengths are no shares of the run.
  """
  if config.train.phases:
    names = ", ".join(phase.name for phase in config.train.phases)
    raise ConfigError(
      f"the config has phases ({names}) of lengths of their own, and runs of "
      "other lengths would not have the same schedule; plan them without, by "
      "--config.train.phases='[]' and what shall hold of a phase"
    )
  budgets = sorted(budgets)
  found: list[Size] = []
  for wanted in sorted(sizes):
    size = find_size(config, wanted, kind)
    if found and size.options == found[-1].options:
      raise UserError(
        f"sizes {wanted:.3g} and the one below give the same model, of "
        f"{size.params:,} parameters; leave one out"
      )
    found.append(size)
    advance()
  names = itertools.product(
    _names("c", budgets), _names("n", [size.params for size in found])
  )
  points = [
    _point(config, size, budget, "-".join(name))
    for (budget, size), name in zip(itertools.product(budgets, found), names)
  ]
  for one, other in zip(points, points[len(found) :]):
    if one.steps == other.steps:
      raise UserError(
        f"budgets {scientific(one.budget, 6)} and "
        f"{scientific(other.budget, 6)} are the same {one.steps} steps of "
        f"{one.params:,} parameters; leave one out"
      )
  return points


def sweep_of(points: list[PlannedPoint]) -> dict[str, dict[str, Any]]:
  """Options by name, the form that a sweep runs."""
  return {point.name: point.options for point in points}


def _names(letter: str, numbers: list[float]) -> list[str]:
  """The numbers in as few digits, three or more, as tell them apart."""
  for digits in range(3, 18):  # 17 tell all floats apart
    names = [letter + scientific(number, digits) for number in numbers]
    if len(set(names)) == len(names):
      break
  return names


def _point(
  config: Config, size: Size, budget: float, name: str
) -> PlannedPoint:
  per_token = train_flops_per_token(size.model, config.data.seq_len)
  batch = config.train.batch_size * config.data.seq_len
  steps = round(budget / per_token / batch)
  if steps < FEWEST_STEPS:
    most = budget / per_token / FEWEST_STEPS / config.data.seq_len
    hint = (
      f"--config.train.batch_size={math.floor(most)}, a"
      if most >= 1
      else "a shorter --config.data.seq_len, a"
    )
    raise UserError(
      f"{scientific(budget)} FLOPs are {steps} steps of {batch:,} tokens for "
      f"{size.params:,} parameters, fewer than {FEWEST_STEPS}; use {hint} "
      "larger budget or smaller sizes"
    )
  options = size.options | {"train.num_steps": steps} | _schedule(config, steps)
  if not config.eval.every:
    options["eval.every"] = steps  # the end's validation is what is fitted
  try:
    made = with_options(config, options)
  except ConfigError as e:
    raise ConfigError(f"point {name}: {e}") from e
  tokens = steps * batch
  active = count(made.model).num_active_params
  return PlannedPoint(
    name, options, made, size.params, active, tokens, per_token * tokens,
    budget, size.shape,
  )  # fmt: skip


def _schedule(config: Config, steps: int) -> dict[str, float]:
  """Warm-up and decay of a run of `steps`, in proportion to the config's own.

  In whole steps: a share of 1 would be read as one step, and two shares that
  are rounded apart may not fit.
  """
  schedule, whole = config.optimizer.schedule, config.train.num_steps
  warmup, decay = (
    round(x * steps if x < 1 else x / whole * steps)
    for x in (schedule.warmup, schedule.decay)
  )
  found = {"optimizer.schedule.warmup": float(warmup)}
  if schedule.name == "wsd":
    found["optimizer.schedule.decay"] = float(min(decay, steps - warmup))
  return found


def scientific(number: float, digits: int = 3) -> str:
  """12345678 as `1.23e7`, without the signs and zeros that %e writes."""
  mantissa, _, exponent = f"{number:.{digits - 1}e}".partition("e")
  if digits > 1:
    mantissa = mantissa.rstrip("0").rstrip(".")
  return f"{mantissa}e{int(exponent)}"
