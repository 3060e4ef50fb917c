# SPDX-License-Identifier: Apache-2.0
"""What a config amounts to, by formula: parameters, FLOPs, memory."""

import argparse

from moejax import cli
from moejax.config import Config, ModelConfig
from moejax.models import (
  count,
  count_parts,
  dtype_bytes,
  kv_bytes_per_token,
  train_flops_per_token,
)

_GIB = 2**30


def describe(config: Config) -> str:
  """A table for people; every figure follows from the config alone."""
  model = config.model
  lines = [f"{'':24}{'parameters':>20}{'of a token':>20}"]
  parts = count_parts(model) | {"total": count(model)}
  for name, counts in parts.items():
    lines.append(
      f"{name:24}{counts.num_params:>20,}{counts.num_active_params:>20,}"
    )
  return "\n".join([*lines, "", *_work(config), "", *_memory(config)])


def _work(config: Config) -> list[str]:
  """FLOPs, and bytes of the cache."""
  model, T = config.model, config.data.seq_len
  train = train_flops_per_token(model, T)
  tokens = config.train.batch_size * T
  every = tokens * config.train.num_steps
  cache, plain = kv_bytes_per_token(model), _plain_cache(model)
  return [
    _row("FLOPs per token", f"{train / 3:,.4g} forward, {train:,.4g} training"),
    _row("tokens a step", f"{tokens:,}; {every:,} in the run"),
    _row("FLOPs of the run", f"{train * every:.4g}"),
    _row(
      "KV cache per token",
      f"{cache:,} bytes, {cache / plain:.1%} of plain attention's {plain:,}",
    ),
  ]


def _plain_cache(model: ModelConfig) -> int:
  """With keys and values of each query head in each layer (MHA)."""
  heads = model.num_layers * model.num_heads
  return heads * sum(model.score_and_value_dims) * dtype_bytes(model)


def _memory(config: Config) -> list[str]:
  """Of all devices together."""
  model = config.model
  params = count(model).num_params
  weights, rows = 4 * params, config.train.batch_size
  stream = model.num_layers * model.d_model * dtype_bytes(model)
  kept = stream * config.data.seq_len
  return [
    _row("weights, float32", _gib(weights)),
    _row("AdamW's two moments", _gib(2 * weights)),
    _row("gradients, float32", _gib(weights)),
    _row(f"weights, {model.dtype}", _gib(dtype_bytes(model) * params)),
    _row(
      "stream between layers",
      f"{_gib(kept)} a row, {_gib(kept * rows)} a batch (kept by remat=full)",
    ),
  ]


def _row(name: str, text: str) -> str:
  return f"{name:24}{text}"


def _gib(size: float) -> str:
  return f"{size / _GIB:,.2f} GiB"


def main(argv: list[str]) -> int:
  """`moejax describe --config=FILE`."""
  parser = argparse.ArgumentParser(
    "moejax describe",
    description="Parameters by part, FLOPs, KV cache and memory of a config.",
  )
  cli.add_config_arguments(parser)
  args, extra = parser.parse_known_args(argv)
  print(describe(cli.parse_config(args.config, extra)))
  return 0
