# SPDX-License-Identifier: Apache-2.0
"""The kernels of GPU (cuDNN) and TPU (splash attention), and their limits.

Both take self-attention only: queries are the tokens of the keys, or an even
part of them, whose places in the row are given then.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.attention.scores import Tokens
from moejax.ops.residuals import ATTENTION

Array = jax.Array

_SPLASH_BLOCKS = (512, 256, 128)
_SPLASH_HEADS = 64  # head sizes are padded to a multiple
_CUDNN_MASK = 4 << 30  # bytes of a row's


def unsupported(
  kernel: str, query_len: int, seq_len: int, head_dim: int, dtype: Any
) -> str | None:
  """Why a kernel cannot take these sizes where it runs; None if it can."""
  if kernel == "splash":
    if query_len % _SPLASH_BLOCKS[-1]:
      return (
        f"splash needs rows, or parts, of a multiple of 128, not {query_len}"
      )
    return None
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"cudnn needs bfloat16, not {jnp.dtype(dtype).name}"
  if query_len % 2:
    return f"cudnn needs rows, or parts, of even length, not {query_len}"
  if 2 * query_len * seq_len > _CUDNN_MASK:
    return f"cudnn's mask would be {query_len} x {seq_len} a row"
  if head_dim % 8 or head_dim > 128:
    return f"cudnn needs heads of a multiple of 8 up to 128, not {head_dim}"
  return None


def _zero_padding(out_BTNH: Array, segments_BT: Array) -> Array:
  # The kernels let padding see padding; this also stops its gradients.
  return jnp.where(segments_BT[:, :, None, None] == 0, 0, out_BTNH)


def cudnn(
  q_BTNH: Array, k_BSKH: Array, v_BSKH: Array,
  queries: Tokens, keys: Tokens, query_places_T: Array | None,
) -> Array:  # fmt: skip
  # cuDNN knows lengths but not segments: those become a bias of [B, 1, T, S].
  mask_BTS = queries.segments[:, :, None] == keys.segments[:, None]
  if query_places_T is not None:
    mask_BTS &= queries.positions[:, :, None] >= keys.positions[:, None]
  out_BTNH = jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None],
    is_causal=query_places_T is None, implementation="cudnn",
  )  # fmt: skip
  return _zero_padding(out_BTNH, queries.segments)


def splash(
  q_BTNH: Array, k_BSKH: Array, v_BSKH: Array,
  queries: Tokens, keys: Tokens, query_places_T: Array | None,
  interpret: bool = False,
) -> Array:  # fmt: skip
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  T, N, H = q_BTNH.shape[1:]
  scaled, dtype = q_BTNH * H**-0.5, q_BTNH.dtype
  # Zeros add nothing to a score, and the zeros that they give are cut off.
  more = ((0, 0),) * 3 + ((0, -H % _SPLASH_HEADS),)
  q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, more) for x in (scaled, k_BSKH, v_BSKH))
  kernel = _splash_kernel(lib, N, T, k_BSKH.shape[1], interpret)
  if query_places_T is not None:
    kernel = _part_of_mask(kernel, k_BSKH.shape[1] // T, query_places_T[0] // T)

  def one_row(q_TNH, k_SKH, v_SKH, segments_T, segments_S):
    q_NTH, k_KSH, v_KSH = (x.transpose(1, 0, 2) for x in (q_TNH, k_SKH, v_SKH))
    segments = lib.SegmentIds(segments_T, segments_S)
    return kernel(q_NTH, k_KSH, v_KSH, segments).transpose(1, 0, 2)

  out_BTNH = jax.vmap(one_row)(
    q_BTNH, k_BSKH, v_BSKH, queries.segments, keys.segments
  )
  out_BTNH = out_BTNH[..., :H].astype(dtype)
  return _zero_padding(out_BTNH, queries.segments)


def _splash_kernel(lib: Any, N: int, T: int, S: int, interpret: bool) -> Any:
  """For queries [N, T, H] over keys [K, S, H] of a row, with all its mask."""
  block = next(b for b in _SPLASH_BLOCKS if T % b == 0)
  # The backward kernel writes a part of d_q for each of its blocks of keys.
  wide = next(n for n in (4, 2, 1) if S % (n * block) == 0) * block
  parts = S // T
  return lib.make_splash_mha(
    lib.MultiHeadMask([lib.CausalMask((S, S), shard_count=parts)] * N),
    head_shards=1, q_seq_shards=parts,
    block_sizes=lib.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=wide,
      block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    ),
    residual_checkpoint_name=ATTENTION,
    interpret=interpret,
  )  # fmt: skip


def _part_of_mask(kernel: Any, parts: int, index: Array) -> Any:
  """The kernel for one of so many parts of the queries."""

  def cut(x):
    axis = 0 if x.ndim == 1 else 1  # places of queries; [heads, T, S] in blocks
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

  return jax.tree.map(cut, kernel)
