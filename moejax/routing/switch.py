# SPDX-License-Identifier: Apache-2.0
"""Token choice with a capacity, beyond which tokens go to no expert.

Switch (Fedus et al. 2021, arXiv:2101.03961) with k = 1, GShard (Lepikhin et al.
2020, arXiv:2006.16668) with k = 2 and renormalised weights.
"""

import jax
import jax.numpy as jnp

from moejax.routing.base import Routing
from moejax.routing.capacity import limit, places_of_group
from moejax.routing.top_k import top_k

Array = jax.Array


def switch(
  logits_TE: Array,
  mask_T: Array,
  *,
  group_size: int,
  k: int = 1,
  capacity_factor: float = 1.25,
  renormalize: bool = False,
  jitter: float = 0.0,
  rng: Array | None = None,
) -> Routing:
  """Sends each token to its k best experts, as far as there is room.

  An expert takes `ceil(capacity_factor * group_size * k / E)` tokens of a
  group, all first choices before all second ones. Weights are the softmax's,
  whoever is dropped. Evaluation and generation (`rng` None) know no capacity,
  since who else is in the batch must not matter there.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere and takes no place.
    group_size: tokens that share places; a divisor of the row length.
    k: experts per token.
    capacity_factor: places over assignments.
    renormalize: divide the k weights by their sum, before any is dropped.
    jitter: as `top_k` has it; Switch trains with 0.01.
    rng: one key per token, shape [T].

  Raises:
    ConfigError: tokens that do not make whole groups, or impossible options.
  """
  T, E = logits_TE.shape
  places = places_of_group(capacity_factor, group_size, k, E)
  routing = top_k(
    logits_TE, mask_T, k=k, renormalize=renormalize, jitter=jitter, rng=rng
  )
  if rng is None:
    return routing
  wanted_A = routing.expert_A
  # Padding wants nothing, and takes no place.
  expert_TX = limit(
    jnp.minimum(wanted_A, E - 1).reshape(T, k), mask_T, E,
    group_size=group_size, places=places,
  )  # fmt: skip
  expert_A = expert_TX.reshape(-1)
  return routing.replace(
    expert_A=expert_A,
    weight_A=jnp.where(expert_A < E, routing.weight_A, 0.0),
    wanted_A=wanted_A,
    capacity=T // group_size * places,
  )
