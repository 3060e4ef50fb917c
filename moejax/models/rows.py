# SPDX-License-Identifier: Apache-2.0
"""What all layers need to know of the rows they see, and the KV cache."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig

Array = jax.Array


@flax.struct.dataclass
class Rows:
  """The tokens of a batch, as attention and routers see them.

  Attributes:
    segment_ids_BT: int32, document within the row; 0 is padding.
    positions_BT: int32, position within the document.
    rng_B: one key a row for routing noise; None where nothing is random.
    tokens_BT: int32, the tokens' ids; the transformer sets them.
    rope_H: RoPE's frequencies in place of the config's; None takes those.
  """

  segment_ids_BT: Array
  positions_BT: Array
  rng_B: Array | None = None
  tokens_BT: Array | None = None
  rope_H: Array | None = None

  def token_keys(self, layer: Array) -> Array | None:
    """One key per token [B, T] of this layer, whatever the batch's split."""
    if self.rng_B is None:
      return None
    tokens_T = jnp.arange(self.segment_ids_BT.shape[1])

    def of_row(key):
      key = jax.random.fold_in(key, layer)
      return jax.vmap(lambda t: jax.random.fold_in(key, t))(tokens_T)

    return jax.vmap(of_row)(self.rng_B)


@flax.struct.dataclass
class Context:
  """What all layers share in one forward pass, computed once.

  Attributes:
    rows: segments and positions of the tokens.
    cos_BTH, sin_BTH: of RoPE's angles.
    keys: the cache's segments, positions and length; None without a cache.
  """

  rows: Rows
  cos_BTH: Array
  sin_BTH: Array
  keys: "KVCache | None"


@flax.struct.dataclass
class LayerCache:
  """Keys (after norm and RoPE) and values of one layer, [B, S, K, H].

  Latent attention keeps its latents as keys, and no values.
  """

  k_BSKH: Array
  v_BSKH: Array

  def append(self, new: Self, length: Array) -> Self:
    """Writes the keys and values of T tokens after the first `length`."""
    at = (0, length, 0, 0)
    update = jax.lax.dynamic_update_slice
    return LayerCache(
      update(self.k_BSKH, new.k_BSKH, at), update(self.v_BSKH, new.v_BSKH, at)
    )


@flax.struct.dataclass
class KVCache:
  """Keys and values of all layers, filled up to `length`.

  Attributes:
    prefix: a LayerCache for each prefix layer, None where it shares another's.
    pattern: a LayerCache for each pattern entry, stacked over repeats; with
      unscanned layers, a tuple of such entries for each repeat.
    segment_ids_BS: int32, 0 where nothing may be attended to.
    positions_BS: int32, position of each cached token.
    length: int32 scalar, columns in use.
  """

  prefix: tuple[LayerCache, ...]
  pattern: tuple[Any, ...]
  segment_ids_BS: Array
  positions_BS: Array
  length: Array

  @classmethod
  def empty(cls, config: ModelConfig, batch_size: int, max_len: int) -> Self:
    """A cache for `max_len` tokens of `batch_size` rows."""
    dtype = jnp.dtype(config.dtype)

    def cache_of(layer, *stack):
      if not layer.has_kv:
        return None
      heads, *widths = config.cache_shape(layer)
      return LayerCache(*(
        jnp.zeros((*stack, batch_size, max_len, heads, width), dtype)
        for width in widths
      ))  # fmt: skip

    def caches(layers, *stack):
      return tuple(cache_of(layer, *stack) for layer in layers)

    R = config.num_repeats
    if config.scan_layers:
      pattern = caches(config.pattern_layers, R)
    else:
      pattern = tuple(caches(config.pattern_layers) for _ in range(R))
    return cls(
      prefix=caches(config.prefix_layers),
      pattern=pattern,
      segment_ids_BS=jnp.zeros((batch_size, max_len), jnp.int32),
      positions_BS=jnp.zeros((batch_size, max_len), jnp.int32),
      length=jnp.zeros((), jnp.int32),
    )

  def append_rows(self, rows: Rows) -> Self:
    """Records segments and positions of the tokens about to be written."""
    at = (0, self.length)
    update = jax.lax.dynamic_update_slice
    return self.replace(
      segment_ids_BS=update(self.segment_ids_BS, rows.segment_ids_BT, at),
      positions_BS=update(self.positions_BS, rows.positions_BT, at),
    )
