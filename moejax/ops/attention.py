# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments: one function, four back ends.

A query sees the keys of its own segment whose position is not after its own.
Segment 0 is padding: it sees nothing, its output is zero and so are its
gradients. Rows with a cache (keys of earlier calls) are the same rule with
S > T. `plain` holds all scores; `blockwise` is flash attention in plain XLA
(Dao, 2023, arXiv:2307.08691), linear in memory; `cudnn` and `splash` are the
kernels of GPU and TPU.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

# Of masked scores. Finite, so that a row with no key has no inf - inf.
_MASKED = -1e30
_FLOOR = -1e29  # no row maximum is below: exp(_MASKED - _FLOOR) is 0


def attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  *,
  query_segments_BT: Array,
  key_segments_BS: Array,
  query_positions_BT: Array,
  key_positions_BS: Array,
  backend: str,
) -> Array:
  """Softmax attention of each query over the keys that it may see.

  Args:
    q_BTNH: queries; head n reads key/value head n // (N / K).
    k_BSKH: keys.
    v_BSKH: values.
    query_segments_BT: segment of each query; 0 is padding.
    key_segments_BS: segment of each key; 0 is padding or an empty cache slot.
    query_positions_BT: position of each query within its segment.
    key_positions_BS: position of each key within its segment.
    backend: one of BACKENDS.

  Returns:
    out_BTNH, of the dtype of the queries; zeros where there is nothing to see.
  """
  if backend not in BACKENDS:
    raise ValueError(
      f"no attention back end {backend!r}; known: {', '.join(BACKENDS)}"
    )
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  if N % K:
    raise ValueError(f"{N} query heads are not a multiple of {K} KV heads")
  return BACKENDS[backend](
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query_segments_BT,
    key_segments_BS,
    query_positions_BT,
    key_positions_BS,
  )


def visible(
  query_segments_BT: Array,
  key_segments_BS: Array,
  query_positions_BT: Array,
  key_positions_BS: Array,
) -> Array:
  """Which keys each query sees, [B, T, S]."""
  q_seg_BT1, k_seg_B1S = query_segments_BT[:, :, None], key_segments_BS[:, None]
  q_pos_BT1 = query_positions_BT[:, :, None]
  k_pos_B1S = key_positions_BS[:, None]
  same_BTS = (q_seg_BT1 == k_seg_B1S) & (q_seg_BT1 != 0)
  return same_BTS & (k_pos_B1S <= q_pos_BT1)


def _plain(q_BTNH, k_BSKH, v_BSKH, *segments_and_positions):
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  # [B, K, G*T, H] against [B, K, S, H]: grouped heads without repeating keys,
  # as batched matmuls of plain layout (faster on a CPU than the einsum).
  q_BKMH = q_BTNH.transpose(0, 2, 1, 3).reshape(B, K, -1, H)
  k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
  scores_BKMS = jnp.einsum(
    "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
  )
  bias_BTS = jnp.where(visible(*segments_and_positions), 0.0, _MASKED)
  scores_BKGTS = scores_BKMS.reshape(B, K, -1, T, S) * H**-0.5
  scores_BKMS = (scores_BKGTS + bias_BTS[:, None, None]).reshape(B, K, -1, S)
  max_BKM1 = jnp.maximum(scores_BKMS.max(-1, keepdims=True), _FLOOR)
  weight_BKMS = jnp.exp(scores_BKMS - jax.lax.stop_gradient(max_BKM1))
  sum_BKM1 = weight_BKMS.sum(-1, keepdims=True)
  out_BKMH = jnp.einsum(
    "BKMS,BKSH->BKMH", weight_BKMS.astype(v_BSKH.dtype), v_BKSH,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  out_BKMH /= jnp.where(sum_BKM1 == 0, 1, sum_BKM1)
  out_BNTH = out_BKMH.astype(q_BTNH.dtype).reshape(B, N, T, H)
  return out_BNTH.transpose(0, 2, 1, 3)


BACKENDS = {"plain": _plain}
