# SPDX-License-Identifier: Apache-2.0
"""The kernels of GPU (cuDNN) and TPU (splash attention), and their limits.

Both take self-attention only: queries and keys are the same tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.residuals import ATTENTION

Array = jax.Array

_SPLASH_BLOCKS = (512, 256, 128)
_SPLASH_HEADS = 64  # head sizes are padded to a multiple


def unsupported(
  kernel: str, seq_len: int, head_dim: int, dtype: Any
) -> str | None:
  """Why a kernel cannot take these sizes where it runs; None if it can."""
  if kernel == "splash":
    if seq_len % _SPLASH_BLOCKS[-1]:
      return f"splash needs rows of a multiple of 128, not {seq_len}"
    return None
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"cudnn needs bfloat16, not {jnp.dtype(dtype).name}"
  if seq_len % 2:
    return f"cudnn needs rows of even length, not {seq_len}"
  if head_dim % 8 or head_dim > 128:
    return f"cudnn needs heads of a multiple of 8 up to 128, not {head_dim}"
  return None


def _zero_padding(out_BTNH: Array, segments_BT: Array) -> Array:
  # The kernels let padding see padding; this also stops its gradients.
  return jnp.where(segments_BT[:, :, None, None] == 0, 0, out_BTNH)


def cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT):
  # cuDNN knows lengths but not segments: those become a bias of [B, 1, T, S].
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None]
  out_BTNH = jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, mask=same_BTS[:, None], is_causal=True,
    implementation="cudnn",
  )  # fmt: skip
  return _zero_padding(out_BTNH, segments_BT)


def splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, interpret=False):
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  T, N, H = q_BTNH.shape[1:]
  scaled = q_BTNH * H**-0.5
  # Zeros add nothing to a score, and the zeros that they give are cut off.
  more = ((0, 0),) * 3 + ((0, -H % _SPLASH_HEADS),)
  q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, more) for x in (scaled, k_BSKH, v_BSKH))
  block = next(b for b in _SPLASH_BLOCKS if T % b == 0)
  mask = lib.MultiHeadMask([lib.CausalMask((T, T))] * N)
  # The backward kernel writes a part of d_q for each of its blocks of keys.
  wide = next(n for n in (4, 2, 1) if T % (n * block) == 0) * block
  kernel = lib.make_splash_mha_single_device(
    mask,
    block_sizes=lib.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=wide,
      block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    ),
    residual_checkpoint_name=ATTENTION,
    interpret=interpret,
  )  # fmt: skip

  def one_row(q_TNH, k_SKH, v_SKH, segments_T):
    q_NTH, k_KSH, v_KSH = (x.transpose(1, 0, 2) for x in (q_TNH, k_SKH, v_SKH))
    out_NTH = kernel(
      q_NTH, k_KSH, v_KSH, lib.SegmentIds(segments_T, segments_T)
    )
    return out_NTH.transpose(1, 0, 2)

  out_BTNH = jax.vmap(one_row)(q_BTNH, k_BSKH, v_BSKH, segments_BT)
  out_BTNH = out_BTNH[..., :H].astype(q_BTNH.dtype)
  return _zero_padding(out_BTNH, segments_BT)
