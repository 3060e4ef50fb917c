# SPDX-License-Identifier: Apache-2.0
"""Experts by the token's id: nothing is learned (Roller et al. 2021).

"Hash layers for large sparse models", arXiv:2106.04426.
"""

import jax
import jax.numpy as jnp

from moejax.routing.base import Routing
from moejax.routing.hashing import hash_scores

Array = jax.Array


def hash_tokens(
  logits_TE: Array,
  mask_T: Array,
  *,
  token_T: Array,
  k: int = 1,
  seed: int = 0,
  rng: Array | None = None,
) -> Routing:
  """Sends each token to k experts by a fixed random table of its id.

  Weights are 1/k, and no gradient reaches the router's matrix but that of the
  router losses: set `loss.load_balance` and `loss.router_z` to 0. Loads are as
  uneven as the ids' frequencies.

  Args:
    logits_TE: not used, but for metrics.
    mask_T: bool, False for padding, which goes nowhere.
    token_T: ids of the tokens.
    k: experts per token, all different.
    seed: of the table, the same for all layers.
    rng: not used.
  """
  del rng
  score_TE = hash_scores(logits_TE.shape[-1], seed, token_T)
  _, expert_TX = jax.lax.top_k(score_TE, k)
  weight_TX = jnp.full(expert_TX.shape, 1.0 / k, jnp.float32)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)
