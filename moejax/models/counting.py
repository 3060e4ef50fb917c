# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs from the config alone, by formula."""

import dataclasses

from moejax.config import LayerConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Counts:
  """Sizes of a model.

  Attributes:
    num_params: all parameters.
    num_active_params: those that one token uses, embedding tables included
      (tied: once), as the published systems count them.
    matmul_params: active parameters that multiply a token: no norms, no input
      table.
  """

  num_params: int
  num_active_params: int
  matmul_params: int


def count(config: ModelConfig) -> Counts:
  """Counts of the model; `tests/models` compares them with the real tree."""
  D = config.d_model
  total = active = matmul = 0
  for layer in config.layers:
    parts = [_mixer(config, layer), _ffn(config, layer)]
    layer_total, layer_active, gains = (sum(x) for x in zip(*parts))
    norms = 2 * D + gains
    total += layer_total + norms
    active += layer_active + norms
    matmul += layer_active
  table = config.vocab_size * D
  tables = table if config.tie_embeddings else 2 * table
  return Counts(total + tables + D, active + tables + D, matmul + table)


def kv_bytes_per_token(config: ModelConfig) -> int:
  """Bytes of the KV cache that one token takes in all layers."""
  floats = 2 * config.num_kv_heads * config.head_dim
  layers = sum(layer.has_kv for layer in config.layers)
  return layers * floats * (2 if config.dtype == "bfloat16" else 4)


def _mixer(config: ModelConfig, layer: LayerConfig) -> tuple[int, int, int]:
  """(weights, those that one token uses, gains and biases)."""
  D, H = config.d_model, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads
  kv = 2 * D * H * kv_heads
  if layer.mixer == "moa":
    moe = config.moe
    expert, router = 2 * D * H * kv_heads, D * moe.num_experts
    return (
      moe.num_experts * expert + kv + router,
      moe.experts_per_token * expert + kv + router,
      D * moe.output_bias,
    )
  projections = 2 * D * H * heads + layer.has_kv * kv
  gains = {
    "none": 0, "head": 2 * H, "head_after_rope": 2 * H,
    "full": H * (heads + kv_heads),
  }[config.qk_norm]  # fmt: skip
  return projections, projections, gains


def _ffn(config: ModelConfig, layer: LayerConfig) -> tuple[int, int, int]:
  """(weights, those that one token uses, gains and biases)."""
  D, moe = config.d_model, config.moe
  if layer.ffn == "mlp":
    return 3 * D * config.d_mlp, 3 * D * config.d_mlp, 0
  expert = 3 * D * moe.d_expert
  always = moe.num_shared_experts * expert + D * moe.num_experts
  return (
    moe.num_experts * expert + always,
    moe.experts_per_token * expert + always,
    D * moe.output_bias,
  )


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Model FLOPs of forward and backward, per token.

  6 per matmul parameter, plus causal attention: scores and weighted values are
  4 * N * H FLOPs per query and key forward, on average seq_len / 2 keys, times
  3 for the backward pass (the convention of PaLM, Chowdhery et al. 2022, with
  the causal half). Recomputation by remat is not counted.
  """
  attention = 6 * config.num_layers * config.num_heads * config.head_dim
  return 6.0 * count(config).matmul_params + attention * seq_len
