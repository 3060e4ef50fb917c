# SPDX-License-Identifier: Apache-2.0
"""Top-1 with a capacity; what is beyond it goes at random to experts with room.

Hunyuan-Large (arXiv:2411.02265) calls it recycle routing. Without recycling it
is the capacity of Switch (Fedus et al. 2021, arXiv:2101.03961): the rest goes
to no expert.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing

Array = jax.Array


def recycle(
  logits_TE: Array,
  mask_T: Array,
  *,
  group_size: int,
  capacity_factor: float = 1.0,
  overflow: str = "recycle",
  rng: Array | None = None,
) -> Routing:
  """Sends each token to its best expert, as far as there is room.

  An expert takes at most `ceil(capacity_factor * group_size / E)` tokens of a
  group, the first in the row: the paper's code leaves open which ones. The
  others take, in order, the free places of all experts in a random order, so an
  expert gets them in proportion to its room. A token's weight is its own
  probability of the expert that it ends at, not renormalised.

  Evaluation and generation (`rng` None) know no capacity: top-1 without drops,
  since who else is in the batch must not matter there.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere and takes no place.
    group_size: tokens that share places, neighbours in the batch; results do
      not depend on how a batch is split as long as it divides a row.
    capacity_factor: places over tokens; 1 is just enough for all.
    overflow: "recycle", or "drop": beyond the capacity a token goes nowhere.
    rng: one key per token, shape [T]; a group draws from its first one.

  Raises:
    ConfigError: tokens that do not make whole groups, or impossible options.
  """
  T, E = logits_TE.shape
  _check(group_size, capacity_factor, overflow, rng)
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  wanted_T = jnp.argmax(prob_TE, axis=-1)
  expert_T = wanted_T
  if rng is not None:
    capacity = -int(-capacity_factor * group_size // E)
    expert_T = jax.vmap(
      lambda *group: _place(*group, E, capacity, overflow == "recycle")
    )(
      wanted_T.reshape(-1, group_size), mask_T.reshape(-1, group_size),
      rng[::group_size],
    ).reshape(T)  # fmt: skip
  there_T = expert_T < E
  weight_T = jnp.take_along_axis(
    prob_TE, jnp.where(there_T, expert_T, 0)[:, None], axis=-1
  )
  weight_T = jnp.where(there_T[:, None], weight_T, 0.0)
  routing = Routing.from_token_choice(
    expert_T[:, None], weight_T, logits_TE, mask_T
  )
  # The balancing loss counts what was wanted.
  return routing.replace(wanted_A=jnp.where(mask_T, wanted_T, E))


def _check(
  group_size: int, capacity_factor: float, overflow: str, rng: Array | None
) -> None:
  if capacity_factor <= 0 or overflow not in ("recycle", "drop"):
    raise ConfigError(
      f"model.moe.router: capacity_factor={capacity_factor} must be positive, "
      f"overflow={overflow!r} 'recycle' or 'drop'"
    )
  if group_size < 1 or (rng is not None and rng.shape[0] % group_size):
    tokens = "" if rng is None else f"{rng.shape[0]} tokens are "
    raise ConfigError(
      f"model.moe.router: {tokens}not groups of group_size={group_size}; use a "
      "divisor of data.seq_len"
    )


def _place(
  wanted_T: Array, mask_T: Array, key: Array, E: int, C: int, recycled: bool
) -> Array:
  """The expert of each token of one group; E is nowhere."""
  wanted_TE = jax.nn.one_hot(wanted_T, E, dtype=jnp.int32) * mask_T[:, None]
  # How many tokens before it want the same expert.
  earlier_TE = jnp.cumsum(wanted_TE, axis=0) - wanted_TE
  earlier_T = jnp.take_along_axis(earlier_TE, wanted_T[:, None], axis=1)[:, 0]
  kept_T = mask_T & (earlier_T < C)
  if not recycled:
    return jnp.where(kept_T, wanted_T, E)
  taken_E = jnp.minimum(wanted_TE.sum(0), C)
  free = (jnp.arange(C)[None] >= taken_E[:, None]).reshape(-1)
  # Free places in a random order, then taken ones: a place is expert * C + i.
  order = jnp.argsort(jnp.where(free, jax.random.uniform(key, (E * C,)), 2.0))
  homeless_T = mask_T & ~kept_T
  turn_T = jnp.cumsum(homeless_T) - 1
  found_T = homeless_T & (turn_T < free.sum())
  place_T = order[jnp.clip(turn_T, 0, E * C - 1)]
  return jnp.where(kept_T, wanted_T, jnp.where(found_T, place_T // C, E))
