# SPDX-License-Identifier: Apache-2.0
"""One layer (a mixer and an MLP or experts, normed) and one repeat."""

import flax.linen as nn
import jax

from moejax.config import LayerConfig, ModelConfig
from moejax.models.attention import Attention
from moejax.models.backends import Backends
from moejax.models.latent_attention import LatentAttention
from moejax.models.layers import Mlp, Norm
from moejax.models.moe import MoE
from moejax.models.moe_attention import MoEAttention
from moejax.models.placement import STREAM
from moejax.models.rows import Context, LayerCache
from moejax.routing import RouterStats

Array = jax.Array


Stats = tuple[RouterStats, ...]


class Block(nn.Module):
  """`x += mixer(norm(x)); x += ffn(norm(x))`, or the norms on the outputs."""

  config: ModelConfig
  layer_config: LayerConfig
  backends: Backends

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    layer: Array,
    cache: LayerCache | None,
    shared: LayerCache | None,
    context: Context,
  ) -> tuple[Array, Stats, LayerCache | None, LayerCache]:
    """Runs one layer.

    Args:
      x_BTD: residual stream.
      layer: index in the stack.
      cache: the layer's own; None without one.
      shared: keys and values of the last layer that has its own.
      context: of this forward pass.

    Returns:
      The stream, the sums of the layer's routers, the cache, and the keys and
      values that this layer read.
    """
    h_BTD, stats, cache, shared = self._mixer(
      self._before("attention_norm", x_BTD), layer, cache, shared, context
    )
    x_BTD += self._after("attention_norm", h_BTD)
    x_BTD = self.backends.placement.constrain(x_BTD, STREAM)
    h_BTD = self._before("ffn_norm", x_BTD)
    if self.layer_config.ffn == "mlp":
      h_BTD = Mlp(self.config, self.config.d_mlp, name="mlp")(h_BTD)
    else:
      moe = MoE(self.config, self.backends, name="moe")
      h_BTD, moe_stats = moe(h_BTD, context.rows, layer)
      stats += (moe_stats,)
    x_BTD += self._after("ffn_norm", h_BTD)
    x_BTD = self.backends.placement.constrain(x_BTD, STREAM)
    return x_BTD, stats, cache, shared

  def _mixer(self, h_BTD, layer, cache, shared, context):
    mixer, how = self.layer_config.mixer, (self.config, self.backends)
    if mixer == "moa":
      moa = MoEAttention(*how, name="attention")
      h_BTD, stats, cache, shared = moa(h_BTD, context, layer, cache)
      return h_BTD, (stats,), cache, shared
    if mixer == "mla":
      latent = LatentAttention(*how, name="attention")
      h_BTD, cache, shared = latent(h_BTD, context, cache)
      return h_BTD, (), cache, shared
    attention = Attention(*how, mixer == "shared_kv", name="attention")
    h_BTD, cache, shared = attention(h_BTD, context, cache, shared)
    return h_BTD, (), cache, shared

  def _before(self, name: str, x_BTD: Array) -> Array:
    return self._norm(name, x_BTD, "pre")

  def _after(self, name: str, x_BTD: Array) -> Array:
    return self._norm(name, x_BTD, "post")

  def _norm(self, name: str, x_BTD: Array, position: str) -> Array:
    cfg = self.config
    if cfg.norm_position != position:
      return x_BTD
    return Norm(cfg.norm, cfg.norm_eps, name=name)(x_BTD)


class Repeat(nn.Module):
  """All layers of the pattern once: the body of the scan."""

  config: ModelConfig
  backends: Backends

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    first_layer: Array,
    caches: tuple[LayerCache | None, ...],
    context: Context,
  ):
    """Returns the stream and, stacked by the scan, (stats, caches)."""
    stats, new_caches, shared = (), [], None
    for i, layer_config in enumerate(self.config.pattern_layers):
      block = Block(self.config, layer_config, self.backends, name=f"block_{i}")
      x_BTD, block_stats, cache, shared = block(
        x_BTD, first_layer + i, caches[i], shared, context
      )
      stats += block_stats
      new_caches.append(cache)
    return x_BTD, (stats, tuple(new_caches))
