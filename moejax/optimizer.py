# SPDX-License-Identifier: Apache-2.0
"""AdamW and Muon, the learning rate over steps and by group, decay."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from moejax.config import (
  Config,
  OptimizerConfig,
  ScheduleConfig,
  schedule_stretches,
)
from moejax.errors import ConfigError
from moejax.routing import resolve
from moejax.routing.probe import experts_of_a_token

# Routed experts, stacked or not; shared ones and the router are not theirs.
ROUTED = r"/w_\w+_E[A-Z]+$"
# Of Adam's updates, about.
_ADAM_RMS = 0.2


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


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Global-norm clip, AdamW or Muon, decay, and each group's own rate.

  Its updates are to be taken times minus the learning rate, which follows from
  the run's step: a step that is not taken does not delay it.
  """
  options = config.optimizer
  parts = [
    _direction(options),
    optax.add_decayed_weights(
      options.weight_decay,
      lambda params: decay_mask(params, options.no_decay),
    ),
  ]
  if options.clip_norm:
    parts.insert(0, _clip_by_global_norm(options.clip_norm))
  if rates := rate_factors(config):
    parts.append(_scale_groups(rates, options.expert_rate))
  return optax.chain(*parts)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
  """Where to go, before decay and learning rate."""
  adam = optax.scale_by_adam(
    config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype
  )
  if config.name == "adamw":  # Loshchilov & Hutter 2019
    return adam
  # Muon (Jordan et al. 2024) of matrices, Adam of all else. Not optax's `muon`:
  # its `nesterov` is one for both, and would make NAdam of Adam.
  axes_of = functools.partial(matrix_axes, adam=config.muon_adam)
  muon = optax.chain(
    optax.contrib.scale_by_muon(
      beta=config.b1, eps=config.eps, mu_dtype=config.mu_dtype,
      weight_dimension_numbers=axes_of,
    ),
    _scale_like_adam(axes_of),
  )  # fmt: skip
  return optax.partition(
    {"muon": muon, "adam": adam},
    lambda params: jax.tree.map(
      lambda _, axes: "adam" if axes is None else "muon",
      params, axes_of(params),
    ),
  )  # fmt: skip


def _scale_like_adam(
  axes_of: Callable[[Any], Any],
) -> optax.GradientTransformation:
  """Gives Muon's updates the root mean square of Adam's.

  So rate and decay mean the same for both (Liu et al. 2025, "Muon is scalable
  for LLM training", arXiv:2502.16982).
  """

  def scaled(x: jax.Array, axes: optax.contrib.MuonDimensionNumbers):
    rows, columns = (math.prod(x.shape[a] for a in side) for side in axes)
    return _ADAM_RMS * math.sqrt(max(rows, columns)) * x

  return optax.stateless(
    lambda updates, params: jax.tree.map(scaled, updates, axes_of(updates))
  )


def matrix_axes(params: Any, adam: tuple[str, ...]) -> Any:
  """Which axes of each parameter Muon takes for rows and columns.

  By the letters of its name: `E` and axes that a scan stacked make matrices of
  their own, `w_q_DNH` is D by (N H), `w_o_NHD` is (N H) by D. None where it is
  no matrix, or one of a vector for each expert, and of parameters whose path
  matches one of `adam`.
  """

  def axes(path: str, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
    letters = path.rpartition("_")[2]
    names = path.rpartition("/")[2]
    whole = letters.isupper() and letters.isalpha() and names.startswith("w_")
    if not whole or any(re.search(pattern, path) for pattern in adam):
      return None
    first = x.ndim - len(letters)  # after what was stacked
    kept = [first + i for i, name in enumerate(letters) if name != "E"]
    rows = 1 if letters.strip("E")[0] in "DFZ" else len(kept) - 1
    if not 0 < rows < len(kept):
      return None
    return optax.contrib.MuonDimensionNumbers(
      tuple(kept[:rows]), tuple(kept[rows:])
    )

  return jax.tree.map(axes, param_paths(params), params)


def rate_factors(config: Config) -> tuple[tuple[str, float], ...]:
  """(pattern, factor of the learning rate); the first that matches holds."""
  found = [rate.rpartition("=") for rate in config.optimizer.rates]
  factors = [(pattern, float(factor)) for pattern, _, factor in found]
  factor = expert_factor(config)
  if factor != 1.0:
    factors.append((ROUTED, factor))
  return tuple(factors)


def expert_factor(config: Config) -> float:
  """The learning rate of routed experts over that of the rest.

  Adam's best rate for a batch B is `2 e_max / (sqrt(B_noise / B) + sqrt(B /
  B_noise))` (Li et al. 2024, arXiv:2405.14578). A routed expert sees 1/n of the
  batch, n = experts over experts per token; with x = B / B_noise the factor is
  `(1 + x) / (1 + x / n) / sqrt(n)`: Hunyuan-Large's rule (arXiv:2411.02265,
  n = 16 and about 0.31, which is x = 0.26). x = 0 is the square-root rule,
  1 / sqrt(n). x is one number for the whole run, also where phases change the
  batch.

  Raises:
    ConfigError: batch_share with a router whose logits decide how many experts
      a token has.
  """
  spec, moe = config.optimizer.expert_rate_spec, config.model.moe
  if spec.name == "same":
    return 1.0
  if spec.name == "fixed":
    return float(spec.kwargs["factor"])
  router = resolve(moe.router_spec)
  k = experts_of_a_token(router, moe.num_experts, moe.router)
  if k is None:
    raise ConfigError(
      f"optimizer.expert_rate={config.optimizer.expert_rate!r} goes by the "
      "share of the batch that an expert sees, and with model.moe.router="
      f"{moe.router!r} the number of experts varies or is not known: use "
      "fixed(factor=...)"
    )
  x, n = float(spec.kwargs["x"]), moe.num_experts / k
  return (1 + x) / (1 + x / n) / math.sqrt(n)


def _scale_groups(
  factors: tuple[tuple[str, float], ...], expert_rate: str
) -> optax.GradientTransformation:
  """Each group's update, its decay included, times its factor.

  Args:
    factors: as `rate_factors` has them.
    expert_rate: what that of `ROUTED` was written as.
  """

  def factor_of(path: str) -> float:
    return next((f for pattern, f in factors if re.search(pattern, path)), 1.0)

  def scale(updates, params):
    paths = param_paths(params)
    asked = [pattern for pattern, _ in factors if pattern != ROUTED]
    _require_matches("optimizer.rates", asked, paths)
    if len(asked) < len(factors):
      _require_routed(expert_rate, paths)
    return jax.tree.map(
      lambda update, path: update * factor_of(path), updates, paths
    )

  return optax.stateless(scale)


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
  _require_matches("optimizer.no_decay", no_decay, param_paths(params))
  return jax.tree.map(
    lambda path: not any(re.search(p, path) for p in no_decay),
    param_paths(params),
  )


def _require_matches(option: str, patterns: Sequence[str], tree: Any) -> None:
  paths = jax.tree.leaves(tree)
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in paths):
      raise ConfigError(
        f"{option}: {pattern!r} matches no parameter; paths look like "
        f"{paths[0]} and {paths[-1]}"
      )


def _require_routed(expert_rate: str, tree: Any) -> None:
  if not any(re.search(ROUTED, path) for path in jax.tree.leaves(tree)):
    raise ConfigError(
      f"optimizer.expert_rate={expert_rate!r}: the model has no routed "
      "experts; leave it at 'same'"
    )


def param_paths(params: Any) -> Any:
  """The tree of each parameter's path, `a/b/c`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "/".join(str(key.key) for key in path), params
  )
