# SPDX-License-Identifier: Apache-2.0
"""A family of sizes from one config: the same shape, smaller or larger.

All widths of a size (residual stream, experts, dense layers, heads, latents)
are the config's times one factor, and its layers too, as far as whole layers
and whole heads allow: the ratio of width to depth stays. Experts, experts per
token, shared experts, the size of one head, query heads per KV head, the prefix
and the vocabulary stay.
"""

import dataclasses
import math
from typing import Any

from moejax.config import Config, ModelConfig, ParallelConfig
from moejax.errors import UserError
from moejax.models import count

WIDTH_STEP = 8  # widths are multiples of this, as matrix units want them
FARTHEST = 0.2  # a size that is further off is refused

# What tells one size and length of a family from another.
SIZE_OPTIONS = (
  "model.d_model", "model.num_layers", "model.num_heads", "model.num_kv_heads",
  "model.d_mlp", "model.moe.d_expert", "model.mla.q_rank", "model.mla.kv_rank",
  "train.num_steps", "optimizer.schedule.warmup", "optimizer.schedule.decay",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
  """One member of the family.

  Attributes:
    options: what it sets in the config, by dotted path.
    model: the model that it makes.
    params: N of the kind that was asked for.
    shape: its width per layer over the config's.
  """

  options: dict[str, Any]
  model: ModelConfig
  params: int
  shape: float


def params_of(model: ModelConfig, kind: str) -> int:
  """N of a model.

  Args:
    model: its config.
    kind: `active`, the parameters a token uses, embedding tables included, as
      published systems count them; or `non-embedding`, without the tables.
  """
  active = _active(model)
  if kind == "active":
    return active
  tables = 1 if model.tie_embeddings else 2
  return active - tables * model.vocab_size * model.d_model


def _active(model: ModelConfig) -> int:
  """As `count`, of deep models by two shallow ones: all repeats are alike."""
  prefix, pattern = len(model.prefix), len(model.pattern)
  one, two = (
    count(
      dataclasses.replace(model, num_layers=prefix + repeats * pattern)
    ).num_active_params
    for repeats in (1, 2)
  )
  return one + (model.num_repeats - 1) * (two - one)


def find_size(config: Config, wanted: float, kind: str) -> Size:
  """The member of the config's family that has about `wanted` parameters.

  Of the depths and widths around the one in proportion, that with the least
  sum of two errors: of the count, and of the ratio of width to depth. A fit
  takes any count, but not shapes that jump.

  Raises:
    UserError: none is within FARTHEST.
  """
  # How it is split over devices is checked when the size is known.
  config = dataclasses.replace(config, parallel=ParallelConfig())
  start = _narrowest(config, wanted, kind, repeats=None)
  near = scaled(config, start, None, kind)
  middle = near.model.num_repeats
  found = []
  for repeats in range(max(1, middle - 2), middle + 3):
    width = _narrowest(config, wanted, kind, repeats)
    for steps in range(max(1, width - 2), width + 2):
      found.append(scaled(config, steps, repeats, kind))
  best = min(found, key=lambda size: _badness(size, wanted))
  if _distance(best.params, wanted) > math.log1p(FARTHEST):
    raise UserError(
      f"no size of this config has {wanted:.3g} {kind} parameters; the nearest "
      f"has {best.params:,}. Ask for that, or change what does not scale "
      "(vocabulary, experts per token, head size)"
    )
  return best


def scaled(config: Config, steps: int, repeats: int | None, kind: str) -> Size:
  """The config with d_model = `steps` * WIDTH_STEP and all in proportion.

  Args:
    config: the family.
    steps: its width.
    repeats: of the layer pattern; in proportion too if None.
    kind: see `params_of`.
  """
  model = config.model
  factor = steps * WIDTH_STEP / model.d_model
  if repeats is None:
    repeats = max(1, round(model.num_repeats * factor))
  kv_heads = max(1, round(model.num_kv_heads * factor))
  options: dict[str, Any] = {
    "model.d_model": steps * WIDTH_STEP,
    "model.num_layers": len(model.prefix) + len(model.pattern) * repeats,
    "model.num_kv_heads": kv_heads,
    "model.num_heads": kv_heads * (model.num_heads // model.num_kv_heads),
  }
  ffns = {layer.ffn for layer in model.layers}
  if "mlp" in ffns:
    options["model.d_mlp"] = _width(model.d_mlp * factor)
  if "moe" in ffns:
    options["model.moe.d_expert"] = _width(model.moe.d_expert * factor)
  if model.uses_mla:
    options["model.mla.kv_rank"] = _width(model.mla.kv_rank * factor)
    if model.mla.q_rank:
      options["model.mla.q_rank"] = _width(model.mla.q_rank * factor)
  made = with_options(config, options).model
  shape = factor * model.num_repeats / repeats
  return Size(options, made, params_of(made, kind), shape)


def with_options(config: Config, options: dict[str, Any]) -> Config:
  """The config with values by dotted path, checked as a whole."""
  values = config.to_dict()
  for path, value in options.items():
    *parents, name = path.split(".")
    section = values
    for parent in parents:
      section = section[parent]
    section[name] = value
  return Config.from_dict(values)


def _narrowest(
  config: Config, wanted: float, kind: str, repeats: int | None
) -> int:
  """The fewest width steps that have at least `wanted` parameters."""
  low, high = 0, 1
  while scaled(config, high, repeats, kind).params < wanted:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    if scaled(config, middle, repeats, kind).params < wanted:
      low = middle
    else:
      high = middle
  return high


def _badness(size: Size, wanted: float) -> float:
  """How far off in size and shape; one too far off is the last resort."""
  off = _distance(size.params, wanted)
  refused = off > math.log1p(FARTHEST)
  return off + (100 * off if refused else abs(math.log(size.shape)))


def _distance(params: float, wanted: float) -> float:
  return abs(math.log(params / wanted))


def _width(width: float) -> int:
  return max(1, round(width / WIDTH_STEP)) * WIDTH_STEP
