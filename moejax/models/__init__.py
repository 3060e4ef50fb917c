# SPDX-License-Identifier: Apache-2.0
"""Thin Linen modules: they declare parameters and call the maths."""

from moejax.models.counting import (
  Counts,
  count,
  count_parts,
  dtype_bytes,
  kv_bytes_per_token,
  train_flops_per_token,
)
from moejax.models.rows import KVCache, Rows
from moejax.models.transformer import (
  ModelOutput,
  Transformer,
  Variables,
  build,
  init_variables,
  stack_repeats,
  unstack_repeats,
)
from moejax.models.watching import Watched, watched_routers

__all__ = [
  "Counts", "KVCache", "ModelOutput", "Rows", "Transformer", "Variables",
  "Watched", "build", "count",
  "count_parts", "dtype_bytes", "init_variables", "kv_bytes_per_token",
  "stack_repeats", "train_flops_per_token", "unstack_repeats",
  "watched_routers",
]  # fmt: skip
