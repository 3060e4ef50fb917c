# SPDX-License-Identifier: Apache-2.0
"""What a router chose for each token: what analyses of routing count."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.routing.base import Routing
from moejax.routing.stats import shares_and_entropy

Array = jax.Array


@flax.struct.dataclass
class Choices:
  """The choices for the tokens of rows; leading axes may be stacked routers.

  They are the router's own, before any capacity, and do not depend on how a
  batch is split.

  Attributes:
    chosen_BTE: bool, the experts of each token; none of a padding token's.
    top_BT: int32, the one of them with the largest share of the router's
      probabilities; E where there is none.
    entropy_BT: entropy of these probabilities as a share of the largest, the
      logarithm of their number.
  """

  chosen_BTE: Array
  top_BT: Array
  entropy_BT: Array

  @classmethod
  def of(cls, routing: Routing, mask_BT: Array) -> Self:
    """The choices in one layer's routing of the flattened tokens."""
    T, E = routing.logits_TE.shape
    expert_A, X = routing.expert_A, routing.experts_per_token
    if routing.wanted_A is not None:
      expert_A = routing.wanted_A
    if X:  # without a scatter
      expert_TX = expert_A.reshape(T, X)
      chosen_TE = (expert_TX[..., None] == jnp.arange(E)[None, None]).any(1)
    else:
      chosen_TE = jnp.zeros((T, E + 1), bool)
      chosen_TE = chosen_TE.at[routing.token_A, expert_A].set(True)[:, :E]
    chosen_TE &= mask_BT.reshape(T, 1)
    prob_TE, entropy_T = shares_and_entropy(routing)
    entropy_T /= jnp.log(max(2, prob_TE.shape[-1]))  # of one there is none
    top_T = jnp.where(chosen_TE, prob_TE[:, :E], -1.0).argmax(-1)
    top_T = jnp.where(chosen_TE.any(-1), top_T, E).astype(jnp.int32)
    return cls(
      chosen_BTE=chosen_TE.reshape(*mask_BT.shape, E),
      top_BT=top_T.reshape(mask_BT.shape),
      entropy_BT=jnp.where(mask_BT, entropy_T.reshape(mask_BT.shape), 0.0),
    )
