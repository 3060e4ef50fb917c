# SPDX-License-Identifier: Apache-2.0
"""Room for only so many tokens an expert: who gets a place, who goes on.

Tokens share places in groups, neighbours in the batch, so that results do not
depend on how a batch is split, as long as a group lies within a row.
"""

import fractions
import math

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError

Array = jax.Array


def places_of_group(
  capacity_factor: float, group_size: int, k: int, E: int
) -> int:
  """`ceil(capacity_factor * group_size * k / E)` places, a group's at most.

  Raises:
    ConfigError: a factor or a group size that is not positive and finite.
  """
  if not 0 < capacity_factor < math.inf or group_size < 1:
    raise ConfigError(
      f"model.moe.router: capacity_factor={capacity_factor} and "
      f"group_size={group_size} must be positive and finite"
    )
  # As it is written: 1.1 is less than the nearest float.
  factor = fractions.Fraction(str(capacity_factor))
  return min(math.ceil(factor * group_size * k / E), group_size)


def check_groups(T: int, group_size: int) -> None:
  """Whether T tokens are whole groups.

  Raises:
    ConfigError: if not.
  """
  if group_size < 1 or T % group_size:
    raise ConfigError(
      f"model.moe.router: {T} tokens are not groups of group_size="
      f"{group_size}; use a divisor of data.seq_len"
    )


def limit(
  expert_TX: Array,
  mask_T: Array,
  E: int,
  *,
  group_size: int,
  places: int,
  recycle_rng: Array | None = None,
) -> Array:
  """The experts that tokens end at: E where there was no place.

  All first choices come before all second ones (Lepikhin et al. 2020, "GShard",
  arXiv:2006.16668), and within them the tokens in their order. Without
  recycling a choice without a place goes nowhere; with it, those that are left
  over take the free places of all experts in a random order, so that an expert
  gets them in proportion to its room.

  Args:
    expert_TX: the experts that are wanted, best first.
    mask_T: False for padding, which takes no place.
    E: experts.
    group_size: tokens that share places.
    places: of each expert in each group.
    recycle_rng: one key a token, [T], of which a group uses its first; None is
      without recycling.

  Raises:
    ConfigError: tokens that do not make whole groups, or several choices that
      shall be recycled: a token might get an expert twice.
  """
  T, X = expert_TX.shape
  check_groups(T, group_size)
  if recycle_rng is not None and X > 1:
    raise ConfigError(
      f"capacity: {X} choices of a token cannot be recycled; use one, or drop"
    )
  G = T // group_size
  by_choice = lambda x: x.reshape(G, group_size, -1).swapaxes(1, 2)
  wanted = by_choice(expert_TX).reshape(G, -1)
  real = by_choice(jnp.broadcast_to(mask_T[:, None], (T, X))).reshape(G, -1)
  if recycle_rng is None:
    place = lambda wanted, real: jnp.where(
      _kept(wanted, real, E, places), wanted, E
    )
    found = jax.vmap(place)(wanted, real)
  else:
    place = lambda *group: _recycle(*group, E, places)
    found = jax.vmap(place)(wanted, real, recycle_rng[::group_size])
  return found.reshape(G, X, group_size).swapaxes(1, 2).reshape(T, X)


def _kept(wanted_A: Array, real_A: Array, E: int, C: int) -> Array:
  """Whether there is a place where it is wanted; first come, first served."""
  wanted_AE = _members(wanted_A, real_A, E)
  earlier_AE = jnp.cumsum(wanted_AE, axis=0) - wanted_AE
  earlier_A = jnp.take_along_axis(earlier_AE, wanted_A[:, None], axis=1)[:, 0]
  return real_A & (earlier_A < C)


def _recycle(
  wanted_A: Array, real_A: Array, key: Array, E: int, C: int
) -> Array:
  """The expert of each of one group, also of those without a place at first."""
  kept_A = _kept(wanted_A, real_A, E, C)
  taken_E = jnp.minimum(_members(wanted_A, real_A, E).sum(0), C)
  free = (jnp.arange(C)[None] >= taken_E[:, None]).reshape(-1)
  # Free places in a random order, then taken ones: a place is expert * C + i.
  order = jnp.argsort(jnp.where(free, jax.random.uniform(key, (E * C,)), 2.0))
  homeless_A = real_A & ~kept_A
  turn_A = jnp.cumsum(homeless_A) - 1
  found_A = homeless_A & (turn_A < free.sum())
  place_A = order[jnp.clip(turn_A, 0, E * C - 1)]
  return jnp.where(kept_A, wanted_A, jnp.where(found_A, place_A // C, E))


def _members(wanted_A: Array, real_A: Array, E: int) -> Array:
  return jax.nn.one_hot(wanted_A, E, dtype=jnp.int32) * real_A[:, None]
