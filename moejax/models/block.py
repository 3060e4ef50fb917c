# SPDX-License-Identifier: Apache-2.0
"""One layer (pre-norm attention, pre-norm MLP or experts) and one repeat."""

import dataclasses

import flax.linen as nn
import jax

from moejax.config import LayerConfig, ModelConfig
from moejax.models.attention import Attention
from moejax.models.layers import Mlp, RMSNorm
from moejax.models.moe import Dispatch, MoE
from moejax.models.rows import Context, LayerCache
from moejax.routing import RouterStats

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Backends:
  """How the same maths is computed here: chosen once, by platform.

  Attributes:
    platform: cpu, gpu or tpu.
    dispatch: moves tokens to experts.
    matmul: name of the grouped matmul back end.
    attention: name of the attention back end, or auto: by the row length.
  """

  platform: str
  dispatch: Dispatch
  matmul: str
  attention: str


class Block(nn.Module):
  """`x += mixer(norm(x)); x += ffn(norm(x))`."""

  config: ModelConfig
  layer_config: LayerConfig
  backends: Backends

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    layer: Array,
    cache: LayerCache | None,
    context: Context,
  ) -> tuple[Array, RouterStats | None, LayerCache | None]:
    """Returns the stream, the router's sums (None if dense), the cache."""
    cfg = self.config
    normed = RMSNorm(cfg.norm_eps, name="attention_norm")(x_BTD)
    attended, cache = Attention(
      cfg, self.backends.platform, self.backends.attention, name="attention"
    )(normed, context, cache)
    x_BTD += attended
    normed = RMSNorm(cfg.norm_eps, name="ffn_norm")(x_BTD)
    if self.layer_config.ffn == "mlp":
      return x_BTD + Mlp(cfg, cfg.d_mlp, name="mlp")(normed), None, cache
    moe = MoE(cfg, self.backends.dispatch, self.backends.matmul, name="moe")
    y_BTD, stats = moe(normed, context.rows, layer)
    return x_BTD + y_BTD, stats, cache


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
    stats, new_caches = [], []
    for i, layer_config in enumerate(self.config.pattern_layers):
      block = Block(self.config, layer_config, self.backends, name=f"block_{i}")
      x_BTD, stat, cache = block(x_BTD, first_layer + i, caches[i], context)
      stats.append(stat)
      new_caches.append(cache)
    return x_BTD, (tuple(stats), tuple(new_caches))
