# SPDX-License-Identifier: Apache-2.0
"""Experts by chance: what routing at all is worth is measured against it.

As THOR trains (Zuo et al. 2021, arXiv:2110.04260).
"""

import jax
import jax.numpy as jnp

from moejax.routing.base import Routing
from moejax.routing.hashing import hash_scores

Array = jax.Array


def random_choice(
  logits_TE: Array,
  mask_T: Array,
  *,
  token_T: Array,
  position_T: Array,
  k: int,
  rng: Array | None = None,
) -> Routing:
  """Sends each token to k experts drawn uniformly, all different; weights 1/k.

  Evaluation and generation (`rng` None) draw by a hash of the token's id and
  its place in the document, so that a text always takes the same way. No
  gradient reaches the router's matrix but that of the router losses.

  Args:
    logits_TE: not used, but for metrics.
    mask_T: bool, False for padding, which goes nowhere.
    token_T, position_T: ids of the tokens and their places.
    k: experts per token.
    rng: one key per token, shape [T].
  """
  E = logits_TE.shape[-1]
  if rng is None:
    score_TE = hash_scores(E, 0, token_T, position_T)
  else:
    score_TE = jax.vmap(lambda key: jax.random.uniform(key, (E,)))(rng)
  _, expert_TX = jax.lax.top_k(score_TE, k)
  weight_TX = jnp.full(expert_TX.shape, 1.0 / k, jnp.float32)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)
