# SPDX-License-Identifier: Apache-2.0
"""What a router did, as sums, so that any split of the batch adds up.

Means and losses are taken once, from the sums over the whole scope; the sums
of microbatches, devices and layers are plain additions or stacks.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.routing.base import Routing

Array = jax.Array


@flax.struct.dataclass
class RouterStats:
  """Sums over the tokens of each row; leading axes may be stacked layers.

  Attributes:
    count_BE: assignments to each expert.
    chosen_BE: the same before any room ran out: what balancing biases follow.
    wanted_BE: the same, as the balancing loss counts them: before any capacity,
      null experts included as in `prob_BE`, each with their mean.
    prob_BE: sum of probabilities of each expert, the softmax or what the router
      says; carries gradient.
    z_B: sum of squared logsumexp of the logits; carries gradient.
    entropy_B: sum of the entropies of these probabilities, in nats; carries
      gradient.
    dropped_B: assignments of real tokens that went nowhere for want of room.
    unrouted_B: real tokens that no expert sees.
    tokens_B: real (unmasked) tokens.
  """

  count_BE: Array
  chosen_BE: Array
  wanted_BE: Array
  prob_BE: Array
  z_B: Array
  entropy_B: Array
  dropped_B: Array
  unrouted_B: Array
  tokens_B: Array

  @classmethod
  def of(cls, routing: Routing, mask_BT: Array) -> Self:
    """Sums of one layer's routing of the flattened tokens of `mask_BT`."""
    B, T = mask_BT.shape
    E = routing.num_experts
    prob_TE, entropy_T = shares_and_entropy(routing)
    lse_T = jax.nn.logsumexp(routing.all_logits_TE, axis=-1)

    def per_row(x):
      by_row = x.reshape(B, T, -1)
      return jnp.where(mask_BT[..., None], by_row, 0.0).sum(1)

    row_A = routing.token_A // T
    nowhere_A = routing.expert_A == E
    real_A = mask_BT.reshape(-1)[routing.token_A]
    dropped_A = nowhere_A & real_A
    if routing.unused_A is not None:
      dropped_A &= ~routing.unused_A
    seen_T = jnp.zeros(B * T, bool).at[routing.token_A].max(~nowhere_A)

    def counts(expert_A, number):
      # Null experts come after the true ones, so padding is not told by E.
      ones = real_A.astype(jnp.float32)
      sums = jnp.zeros((B, number + 1)).at[row_A, expert_A].add(ones)
      return sums[:, :number]

    count_BE = chosen_BE = counts(routing.expert_A, E)
    if routing.wanted_A is not None:
      chosen_BE = counts(routing.wanted_A, E)
    wanted_BE = chosen_BE
    if routing.counted_A is not None:
      wanted_BE = counts(routing.counted_A, prob_TE.shape[-1])
      wanted_BE = _evened(wanted_BE, E)
    return cls(
      count_BE=count_BE,
      chosen_BE=chosen_BE,
      wanted_BE=wanted_BE,
      prob_BE=per_row(prob_TE),
      z_B=per_row(lse_T**2)[:, 0],
      entropy_B=per_row(entropy_T)[:, 0],
      dropped_B=jnp.zeros(B).at[row_A].add(dropped_A.astype(jnp.float32)),
      unrouted_B=per_row(jnp.where(seen_T, 0.0, 1.0))[:, 0],
      tokens_B=mask_BT.sum(1).astype(jnp.float32),
    )


def _evened(count_BE: Array, E: int) -> Array:
  """Null experts, those beyond E, do the same and so share their load."""
  null_BE = count_BE[:, E:]
  if not null_BE.size:
    return count_BE
  mean_B1 = null_BE.mean(1, keepdims=True)
  return count_BE.at[:, E:].set(jnp.broadcast_to(mean_B1, null_BE.shape))


def shares_and_entropy(routing: Routing) -> tuple[Array, Array]:
  """Shares that the balancing loss works on, and their entropies in nats.

  Null experts' shares stand behind the others'.
  """
  if routing.prob_TE is None:
    log_prob_TE = jax.nn.log_softmax(routing.all_logits_TE, axis=-1)
    prob_TE = jnp.exp(log_prob_TE)
  else:
    prob_TE = routing.prob_TE
    log_prob_TE = jnp.log(jnp.maximum(prob_TE, jnp.finfo(jnp.float32).tiny))
  return prob_TE, -(prob_TE * log_prob_TE).sum(-1)
