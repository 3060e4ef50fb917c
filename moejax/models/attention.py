# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with RoPE and QK-norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models.layers import rms_norm, rope, scale, weight
from moejax.models.rows import Context, LayerCache
from moejax.ops.attention import attention, choose_backend

Array = jax.Array


class Attention(nn.Module):
  """Causal within each segment; GQA (Ainslie et al. 2023).

  QK-norm is RMSNorm before RoPE, over all heads at once ("full", OLMoE) or per
  head ("head", Qwen3).
  """

  config: ModelConfig
  platform: str
  backend: str

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    context: Context,
    cache: LayerCache | None,
  ) -> tuple[Array, LayerCache | None]:
    """Attends within `x`, or within `cache` after writing `x` at its end.

    Args:
      x_BTD: normed input.
      context: of this forward pass.
      cache: this layer's keys and values; None without a cache.
    """
    cfg, rows, keys = self.config, context.rows, context.keys
    D, N, K, H = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    dtype, std = x_BTD.dtype, cfg.init_std
    w_q = weight(
      self, "w_q_DNH", (D, N, H), ("embed", "heads", "head_dim"), std
    )
    w_k = weight(
      self, "w_k_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std
    )
    w_v = weight(
      self, "w_v_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std
    )
    w_o = weight(
      self, "w_o_NHD", (N, H, D), ("heads", "head_dim", "embed"), std
    )
    q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, w_q.astype(dtype))
    k_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_k.astype(dtype))
    v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_v.astype(dtype))
    angles = context.cos_BTH, context.sin_BTH
    q_BTNH = rope(self._norm("q_norm", q_BTNH), *angles)
    k_BTKH = rope(self._norm("k_norm", k_BTKH), *angles)
    if cache is None:
      k_BSKH, v_BSKH = k_BTKH, v_BTKH
      segments_BS, positions_BS = rows.segment_ids_BT, rows.positions_BT
    else:
      at = (0, keys.length, 0, 0)
      k_BSKH = jax.lax.dynamic_update_slice(cache.k_BSKH, k_BTKH, at)
      v_BSKH = jax.lax.dynamic_update_slice(cache.v_BSKH, v_BTKH, at)
      segments_BS, positions_BS = keys.segment_ids_BS, keys.positions_BS
      cache = LayerCache(k_BSKH, v_BSKH)
    backend, _ = choose_backend(
      self.platform, self.backend, seq_len=k_BSKH.shape[1], head_dim=H,
      dtype=dtype,
    )  # fmt: skip
    y_BTNH = attention(
      q_BTNH, k_BSKH, v_BSKH,
      query_segments_BT=rows.segment_ids_BT, key_segments_BS=segments_BS,
      query_positions_BT=rows.positions_BT, key_positions_BS=positions_BS,
      backend=backend,
    )  # fmt: skip
    y_BTD = jnp.einsum("btnh,nhd->btd", y_BTNH, w_o.astype(dtype))
    return y_BTD, cache

  def _norm(self, name: str, x_BTNH: Array) -> Array:
    cfg = self.config
    if cfg.qk_norm == "none":
      return x_BTNH
    B, T, N, H = x_BTNH.shape
    if cfg.qk_norm == "head":
      return rms_norm(x_BTNH, scale(self, name, H, "head_dim"), cfg.norm_eps)
    gain = scale(self, name, N * H, "norm")
    return rms_norm(x_BTNH.reshape(B, T, N * H), gain, cfg.norm_eps).reshape(
      B, T, N, H
    )
