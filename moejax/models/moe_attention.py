# SPDX-License-Identifier: Apache-2.0
"""Mixture of attention heads: routed queries and outputs, shared keys.

Zhang et al. 2022 (arXiv:2210.05144), as JetMoE has it (arXiv:2404.07413).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.errors import ConfigError
from moejax.experts import scale_rows
from moejax.models.attention import attend, clip_qkv
from moejax.models.backends import Backends
from moejax.models.layers import weight
from moejax.models.moe import (
  ROUTER,
  STATS,
  RoutedTokens,
  add_bias,
  route,
  router_weights,
)
from moejax.models.placement import STREAM, TOKENS, Axes, Partial
from moejax.models.rope import rope
from moejax.models.rows import Context, LayerCache
from moejax.models.watching import choices_if_watched, record
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.routing import RouterStats, Routing

Array = jax.Array

_NOISE = 1 << 20  # sets this router's noise apart from the MLP's of the layer

W_Q = Axes("expert", "embed", "kv_heads", None)
W_O = Axes("expert", "kv_heads", None, "embed")
CHOSEN = Axes("batch", "tokens", None, "kv_heads", None)  # [B, T, X, K, H]


class MoEAttention(nn.Module):
  """Each expert has its own query and output projections of K heads.

  A token's X experts give it N = K * X query heads; head c of each reads the
  one set of keys and values of head c. One routing serves both projections.
  """

  config: ModelConfig
  backends: Backends

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
    dtype = x_BTD.dtype
    w_k, w_v = (
      weight(self, name, (D, K, H), ("embed", "kv_heads", "head_dim"), cfg)
      for name in ("w_k_DKH", "w_v_DKH")
    )
    w_q = weight(self, "w_q_EDKH", (E, D, K, H), W_Q, cfg).astype(dtype)
    w_o = weight(self, "w_o_EKHD", (E, K, H, D), W_O, cfg).astype(dtype)
    tokens = RoutedTokens.of(cfg, context.rows, layer + _NOISE)
    q_BTXKH, stats, choice = self._queries(x_BTD, tokens, w_q)
    # Head c of all X experts reads keys of head c: neighbours, as GQA has them.
    q_BTNH = q_BTXKH.swapaxes(2, 3).reshape(B, T, K * X, H)
    angles = context.cos_BTH, context.sin_BTH
    q_BTNH = rope(clip_qkv(cfg, q_BTNH), *angles)
    k_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_k.astype(dtype))
    v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, w_v.astype(dtype))
    kv = LayerCache(rope(clip_qkv(cfg, k_BTKH), *angles), clip_qkv(cfg, v_BTKH))
    if cache is not None:
      kv = cache = cache.append(kv, context.keys.length)
    y_BTNH = attend(self.backends, q_BTNH, kv, context)
    y_BTXKH = y_BTNH.reshape(B, T, K, X, H).swapaxes(2, 3)
    y_BTD = self._output(y_BTXKH, choice, w_o)
    return add_bias(self, cfg, y_BTD), stats, cache, kv

  def _queries(self, x_BTD: Array, tokens: RoutedTokens, w_q_EDKH: Array):
    """Queries [B, T, X, K, H], the routing's sums, experts and weights."""
    cfg, backends = self.config, self.backends

    def local(x_BTD, tokens, router, w_q_EDKH):
      B, T, D = x_BTD.shape
      E, _, K, H = w_q_EDKH.shape
      routing, stats = route(cfg, backends, x_BTD, tokens, router)
      X = routing.experts_per_token
      if not X:
        raise ConfigError(
          f"model.moe.router={cfg.moe.router!r} gives tokens no fixed number "
          "of experts, which the heads of moa layers need; use a token choice"
        )
      q_AF = backends.dispatch(
        self._multiply, w_q_EDKH.reshape(E, D, K * H), x_BTD.reshape(B * T, D),
        routing, combine=False,
      )  # fmt: skip
      choice = routing.expert_A, routing.weight_A
      choice = jax.tree.map(lambda x: x.reshape(B, T, X), choice)
      choices = choices_if_watched(self, routing, tokens.mask_BT)
      return q_AF.reshape(B, T, X, K, H), stats, choice, choices

    *results, choices = backends.placement.local(
      local, (STREAM, TOKENS, ROUTER, W_Q), (CHOSEN, STATS, STREAM, TOKENS)
    )(x_BTD, tokens, router_weights(self, cfg), w_q_EDKH)
    record(self, x_BTD, choices)
    return results

  def _output(self, y_BTXKH: Array, choice, w_o_EKHD: Array) -> Array:
    """The weighted sum of the chosen experts' output projections."""
    backends, num_experts = self.backends, self.config.moe.num_experts

    def local(y_BTXKH, choice, w_o_EKHD):
      B, T, X, K, H = y_BTXKH.shape
      E, D = w_o_EKHD.shape[0], w_o_EKHD.shape[-1]
      # Each row is one assignment, and so a token of its own.
      routing = Routing.of_rows(*choice, num_experts)
      y_AD = backends.dispatch(
        self._multiply, w_o_EKHD.reshape(E, K * H, D),
        y_BTXKH.reshape(B * T * X, K * H), routing,
      )  # fmt: skip
      return y_AD.reshape(B, T, X, D).sum(2)

    return backends.placement.local(
      local, (CHOSEN, STREAM, W_O), Partial(STREAM, over=("kv_heads",))
    )(y_BTXKH, choice, w_o_EKHD)

  def _multiply(self, h_AD, sizes_E, w_EDF, scale_A=None):
    if scale_A is not None:
      h_AD = scale_rows(h_AD, scale_A)
    return grouped_matmul(h_AD, w_EDF, sizes_E, backend=self.backends.matmul)
