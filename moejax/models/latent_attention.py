# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: keys and values from one small vector a token.

DeepSeek-V2 (arXiv:2405.04434) and DeepSeek-V3 (arXiv:2412.19437).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models.attention import attend
from moejax.models.backends import Backends
from moejax.models.layers import rms_norm, scale, weight
from moejax.models.rope import rope, score_factor
from moejax.models.rows import Context, LayerCache

Array = jax.Array

_EPS = 1e-6  # of the latents' norms, whatever the config says of the others


class LatentAttention(nn.Module):
  """Each head's keys and values are projections of a normed latent `c_BTZ`.

  Beside it stands one key of `rope_dim` channels for all heads, which alone is
  rotated. The cache holds just these two. Without a cache keys and values are
  written out; with one, their projections are moved to the queries and to the
  output ("absorbed"), so that attention reads the latents as they are: the
  same numbers, with one key for all heads.
  """

  config: ModelConfig
  backends: Backends

  @nn.compact
  def __call__(
    self, x_BTD: Array, context: Context, cache: LayerCache | None
  ) -> tuple[Array, LayerCache | None, LayerCache]:
    """Output [B, T, D], the filled cache, and the latents that were read."""
    cfg = self.config
    D, N, mla = cfg.d_model, cfg.num_heads, cfg.mla
    Z, H = mla.kv_rank, mla.nope_dim
    q_BTNH, q_rope_BTNH = self._queries(x_BTD, context)
    latent = self._latent(x_BTD, context)
    w_k = self._weight("w_k_up_ZNH", (Z, N, H), ("latent", "heads", "head_dim"))
    w_v = self._weight(
      "w_v_up_ZNH", (Z, N, mla.v_dim), ("latent", "heads", "head_dim")
    )
    w_k, w_v = w_k.astype(x_BTD.dtype), w_v.astype(x_BTD.dtype)
    # Back ends divide by the root of the width that they see.
    size = (H + mla.rope_dim) ** -0.5 * score_factor(cfg.rope_scaling_spec)
    if cache is None:
      q, kv = self._expanded(q_BTNH, q_rope_BTNH, latent, w_k, w_v, size)
      y_BTNH = attend(self.backends, q, kv, context)
      y_BTNH = y_BTNH[..., : mla.v_dim]
    else:
      latent = cache = cache.append(latent, context.keys.length)
      q_BTNZ = jnp.einsum("btnh,znh->btnz", q_BTNH, w_k)
      q_BTNH = jnp.concatenate([q_BTNZ, q_rope_BTNH], -1)
      q_BTNH *= size * q_BTNH.shape[-1] ** 0.5
      # Values are the first Z channels of the keys.
      both = LayerCache(latent.k_BSKH, latent.k_BSKH)
      y_BTNZ = attend(self.backends, q_BTNH, both, context)
      y_BTNH = jnp.einsum("btnz,znh->btnh", y_BTNZ[..., :Z], w_v)
    w_o = self._weight(
      "w_o_NHD", (N, mla.v_dim, D), ("heads", "head_dim", "embed")
    )
    y_BTD = jnp.einsum("btnh,nhd->btd", y_BTNH, w_o.astype(x_BTD.dtype))
    return y_BTD, cache, latent

  def _queries(self, x_BTD: Array, context: Context) -> tuple[Array, Array]:
    """The part of each query without a position, and the rotated part."""
    cfg, mla = self.config, self.config.mla
    shape = (cfg.num_heads, mla.nope_dim + mla.rope_dim)
    axes = ("heads", "head_dim")
    if mla.q_rank:
      down = self._weight(
        "w_q_down_DZ", (cfg.d_model, mla.q_rank), ("embed", "latent")
      )
      c_BTZ = x_BTD @ down.astype(x_BTD.dtype)
      c_BTZ = rms_norm(c_BTZ, scale(self, "q_norm", mla.q_rank, "norm"), _EPS)
      w = self._weight("w_q_up_ZNH", (mla.q_rank, *shape), ("latent", *axes))
    else:
      c_BTZ = x_BTD
      w = self._weight("w_q_DNH", (cfg.d_model, *shape), ("embed", *axes))
    q_BTNH = jnp.einsum("btz,znh->btnh", c_BTZ, w.astype(x_BTD.dtype))
    q_BTNH, q_rope_BTNH = jnp.split(q_BTNH, [mla.nope_dim], axis=-1)
    return q_BTNH, rope(q_rope_BTNH, context.cos_BTH, context.sin_BTH)

  def _latent(self, x_BTD: Array, context: Context) -> LayerCache:
    """Normed latent and rotated key in one, [B, T, 1, kv_rank + rope_dim]."""
    cfg, mla = self.config, self.config.mla
    down = self._weight(
      "w_kv_down_DZ", (cfg.d_model, mla.kv_rank), ("embed", "latent")
    )
    w_rope = self._weight(
      "w_k_rope_DH", (cfg.d_model, mla.rope_dim), ("embed", "head_dim")
    )
    c_BTZ = x_BTD @ down.astype(x_BTD.dtype)
    c_BTZ = rms_norm(c_BTZ, scale(self, "kv_norm", mla.kv_rank, "norm"), _EPS)
    k_BTKH = (x_BTD @ w_rope.astype(x_BTD.dtype))[:, :, None]
    k_BTKH = rope(k_BTKH, context.cos_BTH, context.sin_BTH)
    k_BTKH = jnp.concatenate([c_BTZ[:, :, None], k_BTKH], -1)
    return LayerCache(k_BTKH, k_BTKH[..., :0])

  def _expanded(self, q_BTNH, q_rope_BTNH, latent, w_k, w_v, size):
    """Queries, and the keys and values of each head written out."""
    mla = self.config.mla
    c_BTZ = latent.k_BSKH[:, :, 0, : mla.kv_rank]
    k_rope_BTKH = latent.k_BSKH[..., mla.kv_rank :]
    k_BTNH = jnp.einsum("btz,znh->btnh", c_BTZ, w_k)
    v_BTNH = jnp.einsum("btz,znh->btnh", c_BTZ, w_v)
    shared = jnp.broadcast_to(k_rope_BTKH, q_rope_BTNH.shape)
    q_BTNH = jnp.concatenate([q_BTNH, q_rope_BTNH], -1)
    k_BTNH = jnp.concatenate([k_BTNH, shared], -1)
    # Back ends have one width for keys and values: zeros change no score.
    width = max(q_BTNH.shape[-1], mla.v_dim)
    q_BTNH = q_BTNH * (size * width**0.5)
    q_BTNH, k_BTNH, v_BTNH = (
      jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
      for x in (q_BTNH, k_BTNH, v_BTNH)
    )
    return q_BTNH, LayerCache(k_BTNH, v_BTNH)

  def _weight(self, name: str, shape, axes) -> Array:
    return weight(self, name, shape, axes, self.config)
