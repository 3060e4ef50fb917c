# SPDX-License-Identifier: Apache-2.0
"""Which tokens see which, and the scores between them.

Beside the legend: `M` the G * T queries that read one KV head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

MASKED = -1e30  # finite, so that a row without keys has no inf - inf
FLOOR = -1e29  # no row maximum is below: exp(MASKED - FLOOR) is 0
BLOCK = 128  # queries, and keys, at once


class Tokens(NamedTuple):
  """Which tokens: `[B, T]` of queries, `[B, S]` of keys, or blocks of them."""

  segments: Array
  positions: Array


def visible(queries: Tokens, keys: Tokens) -> Array:
  """Which keys each query sees, [B, T, S]."""
  segments_BT1 = queries.segments[:, :, None]
  same_BTS = (segments_BT1 == keys.segments[:, None]) & (segments_BT1 != 0)
  return same_BTS & (keys.positions[:, None] <= queries.positions[:, :, None])


def masked_scores(q_BKMH, k_BKSH, visible_BTS):
  """Scaled and masked scores, float32."""
  M, H = q_BKMH.shape[2:]
  T = visible_BTS.shape[1]
  scores_BKMS = jnp.einsum(
    "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
  )
  # A sum, not a choice: it needs no mask in the backward pass. Repeated for
  # the heads of a group, since splitting M would cost a pass over the scores.
  bias_BTS = jnp.where(visible_BTS, 0.0, MASKED)
  bias_BMS = jnp.tile(bias_BTS, (1, M // T, 1))
  return scores_BKMS * H**-0.5 + bias_BMS[:, None]


def matmul(x_BKMS, y_BKSH):
  return jnp.matmul(x_BKMS, y_BKSH, preferred_element_type=jnp.float32)
