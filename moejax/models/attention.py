# SPDX-License-Identifier: Apache-2.0
"""Grouped-query self-attention with RoPE, QK-norm and shared keys."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models.backends import Backends
from moejax.models.layers import rms_norm, scale, weight
from moejax.models.placement import TOKENS, Axes, OneDevice
from moejax.models.rope import rope
from moejax.models.rows import Context, LayerCache
from moejax.ops.attention import attention, choose_backend

Array = jax.Array


class Attention(nn.Module):
  """Causal within each segment; GQA (Ainslie et al. 2023).

  QK-norm is RMSNorm before RoPE, over all heads at once ("full", OLMoE) or per
  head ("head", Qwen3), or per head after RoPE ("head_after_rope", Hunyuan).

  With `shares_kv` the layer has no keys and values of its own: it reads those
  of the last layer that has (cross-layer attention, Brandon et al. 2024, as in
  Hunyuan-Large). There each layer norms the shared keys with a gain of its own;
  a gain on a key's channel is the same gain on the query's, so the keys are
  kept without it, once for all layers that read them.
  """

  config: ModelConfig
  backends: Backends
  shares_kv: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    context: Context,
    cache: LayerCache | None,
    shared: LayerCache | None,
  ) -> tuple[Array, LayerCache | None, LayerCache]:
    """Attends within `x`, or within the cache after writing `x` at its end.

    Args:
      x_BTD: normed input.
      context: of this forward pass.
      cache: this layer's keys and values; None without a cache.
      shared: keys and values of the last layer that has its own.

    Returns:
      The output [B, T, D], the filled cache, and what this layer read.
    """
    cfg = self.config
    D, N, K, H = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    angles = context.cos_BTH, context.sin_BTH
    q_BTNH = clip_qkv(cfg, self._norm("q_norm", self._project(x_BTD, "q", N)))
    q_BTNH = rope(q_BTNH, *angles)
    if not self.shares_kv:
      k_BTKH = self._norm("k_norm", self._project(x_BTD, "k", K))
      k_BTKH = rope(clip_qkv(cfg, k_BTKH), *angles)
      if cfg.qk_norm == "head_after_rope":
        k_BTKH = rms_norm(k_BTKH, jnp.ones(H), cfg.norm_eps)
      v_BTKH = clip_qkv(cfg, self._project(x_BTD, "v", K))
      shared = LayerCache(k_BTKH, v_BTKH)
      if cache is not None:
        shared = cache = cache.append(shared, context.keys.length)
    if cfg.qk_norm == "head_after_rope":
      gains = (scale(self, name, H, "head_dim") for name in NORMS)
      q_BTNH = rms_norm(q_BTNH, next(gains) * next(gains), cfg.norm_eps)
    y_BTNH = attend(self.backends, q_BTNH, shared, context)
    w_o = weight(
      self, "w_o_NHD", (N, H, D), ("heads", "head_dim", "embed"), cfg
    )
    y_BTD = jnp.einsum("btnh,nhd->btd", y_BTNH, w_o.astype(x_BTD.dtype))
    return y_BTD, cache, shared

  def _project(self, x_BTD: Array, which: str, heads: int) -> Array:
    cfg, letter = self.config, "N" if which == "q" else "K"
    w = weight(
      self, f"w_{which}_D{letter}H", (cfg.d_model, heads, cfg.head_dim),
      ("embed", "heads" if which == "q" else "kv_heads", "head_dim"),
      cfg,
    )  # fmt: skip
    return jnp.einsum("btd,dnh->btnh", x_BTD, w.astype(x_BTD.dtype))

  def _norm(self, name: str, x_BTNH: Array) -> Array:
    cfg = self.config
    if cfg.qk_norm in ("none", "head_after_rope"):
      return x_BTNH
    B, T, N, H = x_BTNH.shape
    if cfg.qk_norm == "head":
      return rms_norm(x_BTNH, scale(self, name, H, "head_dim"), cfg.norm_eps)
    gain = scale(self, name, N * H, "norm")
    return rms_norm(x_BTNH.reshape(B, T, N * H), gain, cfg.norm_eps).reshape(
      B, T, N, H
    )


NORMS = ("q_norm", "k_norm")


def clip_qkv(config: ModelConfig, x: Array) -> Array:
  """Queries, keys and values within +- `clip_qkv` (DBRX), if it is set."""
  bound = config.clip_qkv
  return jnp.clip(x, -bound, bound) if bound else x


def query_parts(placement: OneDevice, kv_heads: int) -> int:
  """How many parts of a row's queries attention sees, each on another device.

  Devices that split rows take whole rows of some of the heads for it (one part;
  DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): as much work for
  each. Too few heads of keys are gathered instead.
  """
  divide = kv_heads % placement.parts("heads_of_rows") == 0
  return 1 if divide else placement.parts("tokens")


def attend(
  backends: Backends, q_BTNH: Array, kv: LayerCache, context: Context
) -> Array:
  """Attention over `kv`: the rows' own tokens, or all that is cached.

  Each device has its rows, heads and queries, and all keys of its rows; or, as
  `query_parts` says, fewer heads and all queries.
  """
  rows, keys, placement = context.rows, context.keys, backends.placement
  queries = rows.segment_ids_BT, rows.positions_BT
  read = queries if keys is None else (keys.segment_ids_BS, keys.positions_BS)
  S, K = kv.k_BSKH.shape[1:3]
  parts = query_parts(placement, K)
  whole = keys is None and parts == 1
  # One key for all heads (latent attention) is whole on each device.
  kv_heads = None if K == 1 else "kv_heads"
  query_axes = Axes("batch", "tokens", "heads", None)
  key_axes = Axes("batch", None, kv_heads, None)
  token_axes = TOKENS
  values = kv
  if whole and placement.parts("tokens") > 1:
    # Said before and after, or the products beside would be gathered.
    stay = Axes("batch", "tokens", kv_heads, None)
    values = jax.tree.map(lambda x: placement.constrain(x, stay), kv)
    q_BTNH = placement.constrain(q_BTNH, query_axes)
    query_axes = key_axes = Axes("batch", None, "heads_of_rows", None)
    token_axes = Axes("batch", None)
  backend, _ = choose_backend(
    backends.platform, backends.attention, seq_len=S,
    head_dim=q_BTNH.shape[3], dtype=q_BTNH.dtype, parts=parts,
  )  # fmt: skip

  def local(q_BTNH, k_BSKH, v_BSKH, queries, read, places_T):
    return attention(
      q_BTNH, k_BSKH, v_BSKH,
      query_segments_BT=queries[0], query_positions_BT=queries[1],
      key_segments_BS=queries[0] if whole else read[0],
      key_positions_BS=queries[1] if whole else read[1],
      backend=backend,
      query_places_T=places_T if keys is None and not whole else None,
    )  # fmt: skip

  y_BTNH = placement.local(
    local,
    (query_axes, key_axes, key_axes, token_axes, Axes("batch"),
     Axes(token_axes[1])),
    query_axes,
  )(
    q_BTNH, values.k_BSKH, values.v_BSKH, queries, read,
    jnp.arange(q_BTNH.shape[1]),
  )  # fmt: skip
  return placement.constrain(y_BTNH, Axes("batch", "tokens", "heads", None))
