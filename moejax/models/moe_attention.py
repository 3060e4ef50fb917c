# SPDX-License-Identifier: Apache-2.0
"""Mixture of attention heads: routed queries and outputs, shared keys.

Zhang et al. 2022 (arXiv:2210.05144), as JetMoE has it (arXiv:2404.07413).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models.attention import attend, clip_qkv
from moejax.models.layers import weight
from moejax.models.moe import Dispatch, add_bias, route
from moejax.models.rope import rope
from moejax.models.rows import Context, LayerCache
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.routing import RouterStats

Array = jax.Array

_NOISE = 1 << 20  # sets this router's noise apart from the MLP's of the layer


class MoEAttention(nn.Module):
  """Each expert has its own query and output projections of K heads.

  A token's X experts give it N = K * X query heads; head c of each reads the
  one set of keys and values of head c. One routing serves both projections.
  """

  config: ModelConfig
  platform: str
  backend: str
  dispatch: Dispatch
  matmul: str

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    context: Context,
    layer: Array,
    cache: LayerCache | None,
  ) -> tuple[Array, RouterStats, LayerCache | None, LayerCache]:
    """Output [B, T, D], the routing's sums, the cache, keys and values."""
    cfg = self.config
    B, T, D = x_BTD.shape
    K, H, E = cfg.num_kv_heads, cfg.head_dim, cfg.moe.num_experts
    X = cfg.num_heads // K
    routing, stats = route(self, cfg, x_BTD, context.rows, layer + _NOISE)
    dtype, std = x_BTD.dtype, cfg.init_std
    w_k, w_v = (
      weight(self, name, (D, K, H), ("embed", "kv_heads", "head_dim"), std)
      for name in ("w_k_DKH", "w_v_DKH")
    )
    w_q = weight(
      self, "w_q_EDKH", (E, D, K, H),
      ("expert", "embed", "kv_heads", "head_dim"), std,
    )  # fmt: skip
    w_o = weight(
      self, "w_o_EKHD", (E, K, H, D),
      ("expert", "kv_heads", "head_dim", "embed"), std,
    )  # fmt: skip
    multiply = functools.partial(_multiply, self.matmul)
    q_AF = self.dispatch(
      multiply, w_q.reshape(E, D, K * H), x_BTD.reshape(B * T, D), routing,
      combine=False,
    )  # fmt: skip
    # Head c of all X experts reads keys of head c: neighbours, as GQA has them.
    q_BTKXH = q_AF.reshape(B, T, X, K, H).swapaxes(2, 3)
    q_BTNH = q_BTKXH.reshape(B, T, K * X, H)
    angles = context.cos_BTH, context.sin_BTH
    q_BTNH = rope(clip_qkv(cfg, q_BTNH), *angles)
    k_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_k.astype(dtype))
    v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_v.astype(dtype))
    kv = LayerCache(rope(clip_qkv(cfg, k_BTKH), *angles), clip_qkv(cfg, v_BTKH))
    if cache is not None:
      kv = cache = cache.append(kv, context.keys.length)
    y_BTNH = attend(self.platform, self.backend, q_BTNH, kv, context)
    y_BTXKH = y_BTNH.reshape(B, T, K, X, H).swapaxes(2, 3)
    y_AD = self.dispatch(
      multiply, w_o.reshape(E, K * H, D), y_BTXKH.reshape(B * T * X, K * H),
      routing.of_assignments(),
    )  # fmt: skip
    y_BTD = y_AD.reshape(B, T, X, D).sum(2)
    return add_bias(self, cfg, y_BTD), stats, cache, kv


def _multiply(backend, h_AD, sizes_E, w_EDF):
  return grouped_matmul(
    h_AD, w_EDF.astype(h_AD.dtype), sizes_E, backend=backend
  )
