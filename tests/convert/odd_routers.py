# SPDX-License-Identifier: Apache-2.0
"""Routers of which training differs from evaluation in one way each."""

import jax
import jax.numpy as jnp

from moejax.routing import Routing
from moejax.routing.top_k import top_k


def sparing(logits_TE, mask_T, *, rng=None):
  """Two experts a token, by noisy scores, and two that it never needs."""
  T, E = logits_TE.shape
  two = top_k(logits_TE, mask_T, k=2, renormalize=True, jitter=0.1, rng=rng)
  none = jnp.zeros((T, 2))
  routing = Routing.from_token_choice(
    jnp.concatenate([two.expert_A.reshape(T, 2), none.astype(int) + E], 1),
    jnp.concatenate([two.weight_A.reshape(T, 2), none], 1), logits_TE, mask_T,
  )  # fmt: skip
  return routing.replace(unused_A=jnp.tile(jnp.array([0, 0, 1, 1], bool), T))


def louder(logits_TE, mask_T, *, rng=None):
  """Two experts a token, whose weights sum to 1, or up to 2 in training."""
  routing = top_k(logits_TE, mask_T, k=2, renormalize=True)
  if rng is None:
    return routing
  more_T = 1 + jax.vmap(jax.random.uniform)(rng)
  return routing.replace(weight_A=routing.weight_A * jnp.repeat(more_T, 2))
