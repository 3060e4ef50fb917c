# SPDX-License-Identifier: Apache-2.0
"""Flash attention (Dao 2023, arXiv:2307.08691) in plain XLA.

Scores exist for one block of queries and one of keys at a time, forward and
backward, so memory is linear in the row length. Pairs of blocks that cannot
see one another are skipped.

Letters beside the legend: `M` the G * T queries of a block that read one KV
head, `I` blocks of queries, `J` blocks of keys.
"""

import functools

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


def blockwise(q_BTNH, k_BSKH, v_BSKH, queries, keys, same_row):
  B, T, N, H = q_BTNH.shape
  K, G = k_BSKH.shape[2], N // k_BSKH.shape[2]
  block_T, block_S = min(BLOCK, T), min(BLOCK, k_BSKH.shape[1])
  q_IBTNH = _split(q_BTNH, block_T)
  q_IBKMH = q_IBTNH.transpose(0, 1, 3, 2, 4).reshape(-1, B, K, G * block_T, H)
  k_JBKSH, v_JBKSH = (
    _split(x, block_S).transpose(0, 1, 3, 2, 4) for x in (k_BSKH, v_BSKH)
  )
  queries = Tokens(*(_split(x, block_T) for x in queries))
  keys = Tokens(*(_split(x, block_S) for x in keys))
  needed_IJ = _needed(queries, keys, same_row)
  out_IBKMH = _flash(q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ)
  out_IBNTH = out_IBKMH.reshape(-1, B, N, block_T, H)
  return out_IBNTH.transpose(1, 0, 3, 2, 4).reshape(B, -1, N, H)[:, :T]


def _split(x: Array, block: int) -> Array:
  """[B, T, ...] -> [blocks, B, block, ...], filled up with zeros: segment 0."""
  pad = -x.shape[1] % block
  x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _needed(queries: Tokens, keys: Tokens, same_row: bool) -> Array:
  """[I, J]: False where no query of a block sees any key of the other."""
  (q_low_IB, q_high_IB), (k_low_JB, k_high_JB) = map(_range, (queries, keys))
  overlap_IJB = (q_low_IB[:, None] <= k_high_JB[None]) & (
    k_low_JB[None] <= q_high_IB[:, None]
  )
  last_IB = queries.positions.max(-1)
  overlap_IJB &= keys.positions.min(-1)[None] <= last_IB[:, None]
  needed_IJ = overlap_IJB.any(-1)
  if same_row:
    needed_IJ &= jnp.tri(*needed_IJ.shape, dtype=bool)
  return needed_IJ


def _range(tokens: Tokens) -> tuple[Array, Array]:
  """Lowest and highest segment of each block, padding aside."""
  highest = jnp.iinfo(tokens.segments.dtype).max
  low_IB = jnp.where(tokens.segments == 0, highest, tokens.segments).min(-1)
  return low_IB, tokens.segments.max(-1)


@jax.custom_vjp
def _flash(q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ):
  inputs = q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ
  return _flash_forward(*inputs)[0]


def _flash_forward(q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ):
  def block_of_queries(args):
    q_BKMH, queries, needed_J = args

    def add(state, args):
      k_BKSH, v_BKSH, keys = args
      max_BKM1, sum_BKM1, out_BKMH = state
      scores_BKMS = masked_scores(q_BKMH, k_BKSH, visible(queries, keys))
      new_max_BKM1 = jnp.maximum(max_BKM1, scores_BKMS.max(-1, keepdims=True))
      weight_BKMS = jnp.exp(scores_BKMS - new_max_BKM1)
      decay_BKM1 = jnp.exp(max_BKM1 - new_max_BKM1)
      sum_BKM1 = sum_BKM1 * decay_BKM1 + weight_BKMS.sum(-1, keepdims=True)
      update_BKMH = matmul(weight_BKMS.astype(v_BKSH.dtype), v_BKSH)
      return new_max_BKM1, sum_BKM1, out_BKMH * decay_BKM1 + update_BKMH

    def step(state, args):
      needed, *args = args
      return jax.lax.cond(needed, add, lambda x, _: x, state, args), None

    zeros_BKMH = jnp.zeros(q_BKMH.shape, jnp.float32)
    zeros_BKM1 = zeros_BKMH[..., :1]
    (max_BKM1, sum_BKM1, out_BKMH), _ = jax.lax.scan(
      step,
      (zeros_BKM1 + FLOOR, zeros_BKM1, zeros_BKMH),
      (needed_J, k_JBKSH, v_JBKSH, keys),
    )
    nothing_BKM1 = sum_BKM1 == 0
    sum_BKM1 = jnp.where(nothing_BKM1, 1, sum_BKM1)
    lse_BKM1 = jnp.where(nothing_BKM1, 0, max_BKM1 + jnp.log(sum_BKM1))
    return (out_BKMH / sum_BKM1).astype(q_BKMH.dtype), lse_BKM1

  out_IBKMH, lse_IBKM1 = jax.lax.map(
    block_of_queries, (q_IBKMH, queries, needed_IJ)
  )
  inputs = q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ
  return out_IBKMH, (*inputs, out_IBKMH, lse_IBKM1)


def _flash_backward(saved, d_out_IBKMH):
  q_IBKMH, k_JBKSH, v_JBKSH, queries, keys, needed_IJ, out, lse_IBKM1 = saved
  inner_IBKM1 = jnp.sum(
    out.astype(jnp.float32) * d_out_IBKMH, axis=-1, keepdims=True
  )
  index_I = jnp.arange(q_IBKMH.shape[0])
  per_query = q_IBKMH, d_out_IBKMH, queries, lse_IBKM1, inner_IBKM1

  def block_of_keys(d_q_IBKMH, args):
    k_BKSH, v_BKSH, keys, needed_I = args

    def step(state, args):
      d_q_IBKMH, d_k_BKSH, d_v_BKSH = state
      i, needed, per_query = args
      d_q, d_k, d_v = jax.lax.cond(
        needed,
        _block_gradients,
        lambda q, k, v, *_: tuple(jnp.zeros(x.shape) for x in (q, k, v)),
        per_query[0], k_BKSH, v_BKSH, keys, per_query[1:],
      )  # fmt: skip
      return (d_q_IBKMH.at[i].add(d_q), d_k_BKSH + d_k, d_v_BKSH + d_v), None

    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    (d_q_IBKMH, d_k_BKSH, d_v_BKSH), _ = jax.lax.scan(
      step, (d_q_IBKMH, zeros_BKSH, zeros_BKSH), (index_I, needed_I, per_query)
    )
    dtype = k_BKSH.dtype
    return d_q_IBKMH, (d_k_BKSH.astype(dtype), d_v_BKSH.astype(dtype))

  d_q_IBKMH, (d_k_JBKSH, d_v_JBKSH) = jax.lax.scan(
    block_of_keys,
    jnp.zeros(q_IBKMH.shape, jnp.float32),
    (k_JBKSH, v_JBKSH, keys, needed_IJ.T),
  )
  d_q_IBKMH = d_q_IBKMH.astype(q_IBKMH.dtype)
  return d_q_IBKMH, d_k_JBKSH, d_v_JBKSH, None, None, None


def _block_gradients(q_BKMH, k_BKSH, v_BKSH, keys, rest):
  """Share of one pair of blocks in the gradients, float32."""
  d_out_BKMH, queries, lse_BKM1, inner_BKM1 = rest
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores_BKMS = masked_scores(q_BKMH, k_BKSH, visible(queries, keys))
  weight_BKMS = jnp.exp(scores_BKMS - lse_BKM1)
  d_weight_BKMS = einsum("BKMH,BKSH->BKMS", d_out_BKMH, v_BKSH)
  scale = q_BKMH.shape[-1] ** -0.5
  d_scores_BKMS = weight_BKMS * (d_weight_BKMS - inner_BKM1) * scale
  d_scores_BKMS = d_scores_BKMS.astype(q_BKMH.dtype)
  weight_BKMS = weight_BKMS.astype(v_BKSH.dtype)
  return (
    einsum("BKMS,BKSH->BKMH", d_scores_BKMS, k_BKSH),
    einsum("BKMS,BKMH->BKSH", d_scores_BKMS, q_BKMH),
    einsum("BKMS,BKMH->BKSH", weight_BKMS, d_out_BKMH),
  )


_flash.defvjp(_flash_forward, _flash_backward)
