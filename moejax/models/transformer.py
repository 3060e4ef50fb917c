# SPDX-License-Identifier: Apache-2.0
"""The one transformer: embed, prefix layers, scanned pattern, norm, logits."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.dispatch import DISPATCHES
from moejax.models.block import Backends, Block, Repeat
from moejax.models.layers import RMSNorm, weight
from moejax.models.rows import KVCache, Rows
from moejax.ops import attention as attention_ops
from moejax.ops import grouped_matmul as matmul_ops
from moejax.routing import RouterStats

Array = jax.Array

REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class ModelOutput:
  """What a forward pass returns.

  Attributes:
    hidden_BTD: normed output of the last layer; `logits` turns it into logits.
    stats: sums of each MoE layer's router, stacked [L, ...]; None if all dense.
    cache: the filled KV cache, None if none was given.
  """

  hidden_BTD: Array
  stats: RouterStats | None
  cache: KVCache | None


class Transformer(nn.Module):
  """`prefix` layers, then `pattern` repeated, as the config says.

  Pure functions of a parameter tree:
    variables = model.init(key, tokens_BT, rows)
    output = model.apply(variables, tokens_BT, rows)
    logits_BTV = model.apply(variables, output.hidden_BTD, method="logits")
  """

  config: ModelConfig
  backends: Backends

  def setup(self):
    cfg = self.config
    V, D = cfg.vocab_size, cfg.d_model
    axes = ("vocab", "embed")
    self.w_embed_VD = weight(self, "w_embed_VD", (V, D), axes, cfg.init_std)
    if not cfg.tie_embeddings:
      self.w_output_VD = weight(self, "w_output_VD", (V, D), axes, cfg.init_std)
    self.prefix = [
      Block(cfg, layer, self.backends) for layer in cfg.prefix_layers
    ]
    if cfg.num_repeats:
      self.repeats = _scanned(cfg)(cfg, self.backends)
    self.final_norm = RMSNorm(cfg.norm_eps)

  def __call__(
    self, tokens_BT: Array, rows: Rows, cache: KVCache | None = None
  ) -> ModelOutput:
    """Runs all layers; with a cache, `tokens` are appended to it."""
    cfg = self.config
    x_BTD = self.w_embed_VD[tokens_BT].astype(cfg.dtype)
    keys = cache.append_rows(rows) if cache else None
    prefix_stats, prefix_caches = [], []
    for i, block in enumerate(self.prefix):
      layer_cache = cache.prefix[i] if cache else None
      x_BTD, stat, layer_cache = block(x_BTD, i, layer_cache, rows, keys)
      prefix_stats.append(stat)
      prefix_caches.append(layer_cache)
    scan_stats, pattern_caches = (), ()
    if cfg.num_repeats:
      firsts_R = len(cfg.prefix) + len(cfg.pattern) * jnp.arange(
        cfg.num_repeats
      )
      caches = cache.pattern if cache else (None,) * len(cfg.pattern)
      x_BTD, (scan_stats, pattern_caches) = self.repeats(
        x_BTD, firsts_R, caches, rows, keys
      )
    if cache:
      cache = keys.replace(
        prefix=tuple(prefix_caches), pattern=pattern_caches,
        length=cache.length + tokens_BT.shape[1],
      )  # fmt: skip
    stats = _stack_stats(prefix_stats, scan_stats)
    return ModelOutput(self.final_norm(x_BTD), stats, cache)

  def output_table(self) -> Array:
    """The output embedding [V, D]."""
    return self.w_embed_VD if self.config.tie_embeddings else self.w_output_VD

  def logits(self, hidden_BTD: Array) -> Array:
    """float32 logits [B, T, V]; training computes them in chunks instead."""
    return jnp.einsum(
      "btd,vd->btv", hidden_BTD, self.output_table().astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip


def build(config: ModelConfig, platform: str | None = None) -> Transformer:
  """The model with the back ends of `platform` (default: JAX's own)."""
  platform = platform or jax.default_backend()
  matmul, _ = matmul_ops.choose_backend(platform, config.moe.matmul)
  dispatch = DISPATCHES[config.moe.dispatch]
  return Transformer(
    config, Backends(platform, dispatch, matmul, config.attention)
  )


def describe_backends(model: Transformer, seq_len: int) -> list[str]:
  """One line for each thing that is computed differently by platform."""
  cfg, backends = model.config, model.backends
  _, matmul = matmul_ops.choose_backend(backends.platform, cfg.moe.matmul)
  name, reason = attention_ops.choose_backend(
    backends.platform, backends.attention, seq_len=seq_len,
    head_dim=cfg.head_dim, dtype=jnp.dtype(cfg.dtype),
  )  # fmt: skip
  return [f"grouped matmul: {matmul}", f"attention: {name} ({reason})"]


def init_params(model: Transformer, key: Array) -> Any:
  """The float32 parameter tree, unboxed; under jit it is created in place."""
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  rows = Rows(jnp.ones((1, 8), jnp.int32), jnp.arange(8)[None])
  return nn.unbox(model.init(key, tokens_BT, rows)["params"])


def _scanned(config: ModelConfig) -> type[nn.Module]:
  """`Repeat` under remat and scan; parameters are stacked over repeats.

  Unscanned layers are the same scan, unrolled: one parameter tree for both.
  """
  body = Repeat
  if config.remat != "none":
    policy = REMAT_POLICIES[config.remat]
    body = nn.remat(body, policy=policy, prevent_cse=False)
  return nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, 0, nn.broadcast, nn.broadcast),
    out_axes=0,
    length=config.num_repeats,
    unroll=1 if config.scan_layers else config.num_repeats,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


def _stack_stats(prefix_stats, scan_stats) -> RouterStats | None:
  """Prefix stats and stacked pattern stats in layer order, [L_moe, ...]."""
  pattern = [s for s in scan_stats if s is not None]
  prefix = [s for s in prefix_stats if s is not None]
  parts = []
  if prefix:
    parts.append(jax.tree.map(lambda *xs: jnp.stack(xs), *prefix))
  if pattern:
    # [R, P, ...] -> [R * P, ...]: repeat by repeat, as the layers run.
    parts.append(
      jax.tree.map(
        lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]), *pattern
      )
    )
  if not parts:
    return None
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
