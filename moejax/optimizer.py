# SPDX-License-Identifier: Apache-2.0
"""AdamW, its schedule, and which parameters are decayed."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.config import (
  Config,
  OptimizerConfig,
  ScheduleConfig,
  schedule_stretches,
)
from moejax.errors import ConfigError


def run_schedule(config: Config) -> optax.Schedule:
  """Learning rate of each step of the run, `step -> rate`.

  Phases that set it have schedules of their own, one after the other.
  """
  stretches = schedule_stretches(config)
  parts = [make_schedule(optimizer, steps) for _, steps, optimizer in stretches]
  if len(parts) == 1:
    return parts[0]
  return optax.join_schedules(parts, [start for start, *_ in stretches[1:]])


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate over `num_steps`, `step -> rate`.

  wsd is warm-up, stable, decay (Hu et al. 2024, MiniCPM; JetMoE): its stable
  part does not know the end of the run, so a run can be extended without
  changing what was already trained.
  """
  schedule = config.schedule
  warmup, decay = schedule.lengths(num_steps)
  peak, final = config.learning_rate, config.learning_rate * schedule.final
  rest = max(num_steps - warmup, 1)
  if schedule.name == "wsd":
    stable = num_steps - warmup - decay
    tail = _decay(schedule, peak, max(decay, 1))
    parts = [optax.constant_schedule(peak), tail]
    boundaries = [warmup, warmup + stable]
  else:
    cosine = schedule.name == "cosine"
    fall = (
      optax.cosine_decay_schedule(peak, rest, schedule.final)
      if cosine
      else optax.linear_schedule(peak, final, rest)
    )
    # The last step of the run is the one that has `final`.
    # Never below it, as rounding would have it.
    parts = [lambda step: jnp.maximum(fall(step + 1), final)]
    boundaries = [warmup]
  # Step 0 already learns: the warm-up ends at the peak, it starts above zero.
  ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, *parts], boundaries)


def _decay(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
  """From the peak to `final` of it in `steps`, by the configured shape."""

  def schedule(step):
    t = jnp.clip((step + 1) / steps, 0.0, 1.0)
    if config.decay_shape == "exponential":
      return peak * config.final**t
    remaining = {
      "linear": 1.0 - t,
      "1-sqrt": 1.0 - jnp.sqrt(t),
      "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
    }[config.decay_shape]
    return peak * (config.final + (1.0 - config.final) * remaining)

  return schedule


def schedule_values(config: Config) -> np.ndarray:
  """The learning rate of every step of the run, float32 [num_steps]."""
  schedule = run_schedule(config)
  steps = jnp.arange(config.train.num_steps)
  return np.asarray(jax.vmap(schedule)(steps), np.float32)


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Global-norm clip, then AdamW (Loshchilov & Hutter 2019).

  Args:
    config: its rate and schedule play no part.
    schedule: the learning rate, `step -> rate`.
  """
  adamw = optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=lambda params: decay_mask(params, config.no_decay),
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(_clip_by_global_norm(config.clip_norm), adamw)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """As optax's, by one factor: its quotients are written out by XLA:CPU.

  That pass over the gradients is 4% of a training step; products are fused.
  """

  def scale(updates, params):
    del params
    norm = optax.tree.norm(updates)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return optax.tree.scale(factor, updates)

  return optax.stateless(scale)


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
  """True where a parameter is decayed.

  Args:
    params: parameter tree.
    no_decay: regular expressions, searched in paths such as
      `repeats/block_0/moe/w_up_EDF`.

  Raises:
    ConfigError: an expression that matches no parameter, most often a typo.
  """
  paths = jax.tree.leaves(param_paths(params))
  for pattern in no_decay:
    if not any(re.search(pattern, path) for path in paths):
      raise ConfigError(
        f"optimizer.no_decay: {pattern!r} matches no parameter; paths look "
        f"like {paths[0]} and {paths[-1]}"
      )
  return jax.tree.map(
    lambda path: not any(re.search(p, path) for p in no_decay),
    param_paths(params),
  )


def param_paths(params: Any) -> Any:
  """The tree of each parameter's path, `a/b/c`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "/".join(str(key.key) for key in path), params
  )
