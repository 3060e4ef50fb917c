# SPDX-License-Identifier: Apache-2.0
"""The one transformer: embed, prefix layers, scanned pattern, norm, logits."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.dispatch import DISPATCHES
from moejax.models.attention import query_parts
from moejax.models.backends import Backends
from moejax.models.block import Block, Repeat
from moejax.models.layers import Norm, weight
from moejax.models.placement import STREAM, TABLE, TOKENS, Axes, OneDevice
from moejax.models.rope import angle_factor, rope_angles, rope_frequencies
from moejax.models.rows import Context, KVCache, Rows
from moejax.models.watching import COLLECTION
from moejax.ops import attention as attention_ops
from moejax.ops import grouped_matmul as matmul_ops
from moejax.ops.residuals import ATTENTION, EXCHANGED, PRODUCTS
from moejax.routing import RouterStats, resolve
from moejax.routing.base import bare
from moejax.routing.probe import probe_tokens

Array = jax.Array
Variables = dict[str, Any]  # what `Transformer.apply` takes: "params", ...

# What is kept; names mark what JAX does not know as a product.
_keep = jax.checkpoint_policies
REMAT_POLICIES = {
  "full": None,
  "exchange": _keep.save_only_these_names(EXCHANGED),
  "experts": _keep.save_from_both_policies(
    _keep.dots_with_no_batch_dims_saveable,
    _keep.save_only_these_names(ATTENTION, EXCHANGED),
  ),
  "dots": _keep.save_from_both_policies(
    _keep.dots_with_no_batch_dims_saveable,
    _keep.save_only_these_names(ATTENTION, EXCHANGED, PRODUCTS),
  ),
}


@flax.struct.dataclass
class ModelOutput:
  """What a forward pass returns.

  Attributes:
    hidden_BTD: normed output of the last layer; `logits` turns it into logits.
    stats: sums of each router in order, stacked [L, ...]; None if all dense.
    cache: the filled KV cache, None if none was given.
  """

  hidden_BTD: Array
  stats: RouterStats | None
  cache: KVCache | None


class Transformer(nn.Module):
  """`prefix` layers, then `pattern` repeated, as the config says.

  Pure functions of its variables, a tree of parameters under "params":
    variables = model.init(key, tokens_BT, rows)
    output = model.apply(variables, tokens_BT, rows)
    logits_BTV = model.apply(variables, output.hidden_BTD, method="logits")
  """

  config: ModelConfig
  backends: Backends | None = None  # None: those of JAX's default platform

  def setup(self):
    cfg = self.config
    backends = self.backends or choose_backends(cfg)
    V, D, axes = cfg.vocab_size, cfg.d_model, TABLE
    self.w_embed_VD = weight(self, "w_embed_VD", (V, D), axes, cfg)
    if not cfg.tie_embeddings:
      self.w_output_VD = weight(self, "w_output_VD", (V, D), axes, cfg)
    block = _checkpointed(Block, cfg, in_scan=False)
    self.prefix = [block(cfg, layer, backends) for layer in cfg.prefix_layers]
    if cfg.scan_layers:
      self.repeats = _scanned(cfg)(cfg, backends)
    else:
      repeat = _checkpointed(Repeat, cfg, in_scan=False)
      self.repeats = [repeat(cfg, backends) for _ in range(cfg.num_repeats)]
    self.final_norm = Norm(cfg.norm, cfg.final_norm_eps or cfg.norm_eps)

  def __call__(
    self, tokens_BT: Array, rows: Rows, cache: KVCache | None = None
  ) -> ModelOutput:
    """Runs all layers; with a cache, `tokens` are appended to it."""
    cfg, placement = self.config, self.placement
    rows = rows.replace(tokens_BT=tokens_BT)
    embed = placement.local(
      lambda table_VD, tokens_BT: table_VD[tokens_BT].astype(cfg.dtype),
      (TABLE, TOKENS), STREAM,
    )  # fmt: skip
    x_BTD = embed(self.w_embed_VD, tokens_BT)
    keys = cache.append_rows(rows) if cache else None
    frequencies_H = rows.rope_H
    if frequencies_H is None:
      frequencies_H = rope_frequencies(
        cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling_spec
      )
    factor = angle_factor(cfg.rope_scaling_spec)
    angles = placement.local(
      lambda positions_BT, frequencies_H: rope_angles(
        positions_BT, frequencies_H, factor
      ),
      (TOKENS, Axes(None)), STREAM,
    )(rows.positions_BT, frequencies_H)  # fmt: skip
    context = Context(rows.replace(rope_H=None), *angles, keys)
    prefix_stats, prefix_caches, shared = (), [], None
    for i, block in enumerate(self.prefix):
      layer_cache = cache.prefix[i] if cache else None
      x_BTD, stats, layer_cache, shared = block(
        x_BTD, i, layer_cache, shared, context
      )
      prefix_stats += stats
      prefix_caches.append(layer_cache)
    repeats = self._scan if cfg.scan_layers else self._loop
    x_BTD, pattern_stats, pattern_caches = repeats(x_BTD, cache, context)
    if cache:
      cache = keys.replace(
        prefix=tuple(prefix_caches), pattern=pattern_caches,
        length=cache.length + tokens_BT.shape[1],
      )  # fmt: skip
    stats = _join_stats(prefix_stats, pattern_stats)
    return ModelOutput(self.final_norm(x_BTD), stats, cache)

  def _scan(self, x_BTD, cache, context):
    """All repeats as one scanned body; stats and caches stacked [R, ...]."""
    cfg = self.config
    firsts_R = len(cfg.prefix) + len(cfg.pattern) * jnp.arange(cfg.num_repeats)
    caches = cache.pattern if cache else (None,) * len(cfg.pattern)
    x_BTD, (stats, caches) = self.repeats(x_BTD, firsts_R, caches, context)
    return x_BTD, stats, caches

  def _loop(self, x_BTD, cache, context):
    """The same, repeat by repeat; caches stay apart, [R] tuples."""
    cfg = self.config
    stats, caches = [], []
    for r, repeat in enumerate(self.repeats):
      first = len(cfg.prefix) + len(cfg.pattern) * r
      mine = cache.pattern[r] if cache else (None,) * len(cfg.pattern)
      x_BTD, (stat, mine) = repeat(x_BTD, first, mine, context)
      stats.append(stat)
      caches.append(mine)
    stats = jax.tree.map(lambda *s: jnp.stack(s), *stats) if stats else ()
    return x_BTD, stats, tuple(caches)

  @property
  def placement(self) -> OneDevice:
    """How its arrays lie on devices."""
    return self.backends.placement if self.backends else OneDevice()

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
  return Transformer(config, choose_backends(config, platform))


def choose_backends(
  config: ModelConfig, platform: str | None = None
) -> Backends:
  """How a config is computed on a platform (default: JAX's own)."""
  platform = platform or jax.default_backend()
  matmul, _ = matmul_ops.choose_backend(platform, config.moe.matmul)
  dispatch = DISPATCHES[config.moe.dispatch]
  router = bare(resolve(config.moe.router_spec))
  return Backends(platform, dispatch, matmul, config.attention, router=router)


def describe_backends(model: Transformer, seq_len: int) -> list[str]:
  """One line for each thing that is computed differently by platform."""
  cfg, backends = model.config, model.backends
  _, matmul = matmul_ops.choose_backend(backends.platform, cfg.moe.matmul)
  name, reason = attention_ops.choose_backend(
    backends.platform, backends.attention, seq_len=seq_len,
    head_dim=cfg.head_dim, dtype=jnp.dtype(cfg.dtype),
    parts=query_parts(backends.placement, cfg.num_kv_heads),
  )  # fmt: skip
  lines = [f"grouped matmul: {matmul}", f"attention: {name} ({reason})"]
  if cfg.moe.dispatch == "padded":
    lines.append(
      "dispatch: padded; ragged in evaluation, which knows no capacity, and "
      "for outputs of attention experts"
    )
  return lines


@functools.partial(jax.jit, static_argnums=0)
def init_variables(model: Transformer, key: Array) -> Variables:
  """Float32 variables, unboxed; one program, also when called bare."""
  return nn.unbox(_init(model, key))


def boxed_variables(model: Transformer) -> Variables:
  """Shapes and dtypes, each in Flax's box with the names of its axes."""
  return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def _init(model: Transformer, key: Array) -> Variables:
  T = probe_tokens(resolve(model.config.moe.router_spec))
  tokens_BT = jnp.zeros((1, T), jnp.int32)
  rows = Rows(jnp.ones((1, T), jnp.int32), jnp.arange(T)[None])
  # So short a row cannot be split; where variables lie, the caller says. Which
  # kernels will compute with them does not matter, and may not be for here.
  config = model.config
  config = dataclasses.replace(
    config, attention="auto", moe=dataclasses.replace(config.moe, matmul="auto")
  )
  return Transformer(config).init(key, tokens_BT, rows)


def unstack_repeats(config: ModelConfig, variables: Variables) -> Variables:
  """The variables of `scan_layers=False` from those of `scan_layers=True`.

  Scanned repeats are one stacked subtree `repeats`; unscanned ones are
  `repeats_0`, `repeats_1`, ...
  """
  return {
    name: _unstack(config.num_repeats, tree) for name, tree in variables.items()
  }


def stack_repeats(config: ModelConfig, variables: Variables) -> Variables:
  """The way back: variables of `scan_layers=True` from layers apart."""
  stacked = {}
  for name, tree in variables.items():
    repeats = [tree[f"repeats_{r}"] for r in range(config.num_repeats)]
    stacked[name] = {
      k: v for k, v in tree.items() if not k.startswith("repeats_")
    } | {"repeats": jax.tree.map(lambda *xs: jnp.stack(xs), *repeats)}
  return stacked


def _unstack(num_repeats: int, tree: Any) -> Any:
  rest = {k: v for k, v in tree.items() if k != "repeats"}
  for r in range(num_repeats):
    rest[f"repeats_{r}"] = jax.tree.map(lambda x, r=r: x[r], tree["repeats"])
  return rest


def _checkpointed(
  module: type[nn.Module], config: ModelConfig, in_scan: bool
) -> type[nn.Module]:
  """The module under the config's remat policy."""
  if config.remat == "none":
    return module
  # Inside a scan, XLA cannot merge the recomputation with the first pass.
  return nn.remat(
    module, policy=REMAT_POLICIES[config.remat], prevent_cse=not in_scan
  )


def _scanned(config: ModelConfig) -> type[nn.Module]:
  """`Repeat` under remat and scan; parameters are stacked over repeats."""
  return nn.scan(
    _checkpointed(Repeat, config, in_scan=True),
    variable_axes={"params": 0, "router_state": 0, COLLECTION: 0},
    split_rngs={"params": True},
    in_axes=(0, 0, nn.broadcast),
    out_axes=0,
    length=config.num_repeats,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


def _join_stats(
  prefix_stats: tuple[RouterStats, ...], pattern_stats: tuple[RouterStats, ...]
) -> RouterStats | None:
  """Prefix stats and stacked pattern stats in the routers' order, [L, ...]."""
  parts = []
  if prefix_stats:
    parts.append(jax.tree.map(lambda *xs: jnp.stack(xs), *prefix_stats))
  if pattern_stats:
    # [R, P, ...] -> [R * P, ...]: repeat by repeat, as the layers run.
    parts.append(
      jax.tree.map(
        lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]),
        *pattern_stats,
      )
    )
  if not parts:
    return None
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
