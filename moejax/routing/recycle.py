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
from moejax.routing.capacity import limit, places_of_group

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
  if overflow not in ("recycle", "drop"):
    raise ConfigError(
      f"model.moe.router: overflow={overflow!r} is not 'recycle' or 'drop'"
    )
  places = places_of_group(capacity_factor, group_size, 1, E)
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  wanted_T = expert_T = jnp.argmax(prob_TE, axis=-1)
  capacity = 0
  if rng is not None:
    expert_T = limit(
      wanted_T[:, None], mask_T, E, group_size=group_size, places=places,
      recycle_rng=rng if overflow == "recycle" else None,
    )[:, 0]  # fmt: skip
    capacity = T // group_size * places
  there_T = expert_T < E
  weight_T = jnp.take_along_axis(
    prob_TE, jnp.where(there_T, expert_T, 0)[:, None], axis=-1
  )
  weight_T = jnp.where(there_T[:, None], weight_T, 0.0)
  routing = Routing.from_token_choice(
    expert_T[:, None], weight_T, logits_TE, mask_T
  )
  # The balancing loss counts what was wanted.
  return routing.replace(
    wanted_A=jnp.where(mask_T, wanted_T, E), capacity=capacity
  )
