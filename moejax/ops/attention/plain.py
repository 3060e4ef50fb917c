# SPDX-License-Identifier: Apache-2.0
"""Attention that holds the scores of whole rows.

Beside the legend: `M` the G * T queries that read one KV head.
"""

import jax
import jax.numpy as jnp

from moejax.ops.attention.scores import (
  BLOCK,
  FLOOR,
  Tokens,
  masked_scores,
  matmul,
  visible,
)

Array = jax.Array

_MAX_UNROLLED = 8  # blocks of queries that are written out one by one


def plain(q_BTNH, k_BSKH, v_BSKH, queries, keys, same_row):
  T = q_BTNH.shape[1]
  # [B, K, G*T, H] against [B, K, S, H]: batched matmuls of plain layout, and
  # grouped heads without repeated keys.
  k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
  if not same_row:
    return _block(q_BTNH, k_BKSH, v_BKSH, visible(queries, keys))
  # Each block of queries meets the keys up to its own end: the half of the
  # scores above the diagonal is mostly not computed.
  block = max(BLOCK, -(-T // _MAX_UNROLLED))
  outs = []
  for start in range(0, T, block):
    end = min(start + block, T)
    visible_BTS = visible(
      Tokens(*(x[:, start:end] for x in queries)),
      Tokens(*(x[:, :end] for x in keys)),
    )
    outs.append(
      _block(
        q_BTNH[:, start:end], k_BKSH[:, :, :end], v_BKSH[:, :, :end],
        visible_BTS,
      )
    )  # fmt: skip
  return jnp.concatenate(outs, axis=1)


def _block(q_BTNH, k_BKSH, v_BKSH, visible_BTS):
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKMH = q_BTNH.transpose(0, 2, 1, 3).reshape(B, K, -1, H)
  scores_BKMS = masked_scores(q_BKMH, k_BKSH, visible_BTS)
  max_BKM1 = jnp.maximum(scores_BKMS.max(-1, keepdims=True), FLOOR)
  weight_BKMS = jnp.exp(scores_BKMS - jax.lax.stop_gradient(max_BKM1))
  sum_BKM1 = weight_BKMS.sum(-1, keepdims=True)
  out_BKMH = matmul(weight_BKMS.astype(v_BKSH.dtype), v_BKSH)
  # Divided after the matmul: H numbers a row instead of S.
  out_BKMH /= jnp.where(sum_BKM1 == 0, 1, sum_BKM1)
  out_BNTH = out_BKMH.astype(q_BTNH.dtype).reshape(B, N, T, H)
  return out_BNTH.transpose(0, 2, 1, 3)
