# SPDX-License-Identifier: Apache-2.0
"""Loads that are equal whatever the logits say: for measuring speed only."""

import jax
import jax.numpy as jnp

from moejax.routing.base import Routing

Array = jax.Array


def forced_balance(
  logits_TE: Array,
  mask_T: Array,
  *,
  position_T: Array,
  k: int,
  rng: Array | None = None,
) -> Routing:
  """Sends the t-th token of a document to experts `t k, t k + 1, ... mod E`.

  FOR SPEED MEASUREMENTS ONLY: what a token is plays no part, so little worth
  having is learned. It takes the loads out of a comparison of kernels, meshes
  and chips. Each document's loads are equal up to its last E / k tokens.

  Args:
    logits_TE: float32 router logits, for the weights.
    mask_T: bool, False for padding, which goes nowhere.
    position_T: places of the tokens in their documents.
    k: experts per token.
    rng: not used.
  """
  del rng
  E = logits_TE.shape[-1]
  first_T1 = (position_T * k)[:, None]
  expert_TX = (first_T1 + jnp.arange(k, dtype=jnp.int32)[None]) % E
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  weight_TX = jnp.take_along_axis(prob_TE, expert_TX, axis=-1)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)
