# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs from the config alone, by formula."""

import dataclasses

from moejax.config import ModelConfig


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
    projections, gains = _attention(config)
    layer_total = layer_active = projections
    if layer.ffn == "mlp":
      layer_total += 3 * D * config.d_mlp
      layer_active += 3 * D * config.d_mlp
    else:
      moe = config.moe
      expert = 3 * D * moe.d_expert
      always = moe.num_shared_experts * expert + D * moe.num_experts
      layer_total += moe.num_experts * expert + always
      layer_active += moe.experts_per_token * expert + always
    norms = 2 * D + gains
    total += layer_total + norms
    active += layer_active + norms
    matmul += layer_active
  table = config.vocab_size * D
  tables = table if config.tie_embeddings else 2 * table
  return Counts(total + tables + D, active + tables + D, matmul + table)


def _attention(config: ModelConfig) -> tuple[int, int]:
  """(projection weights, QK-norm gains) of one attention."""
  D, H = config.d_model, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads
  projections = 2 * D * H * (heads + kv_heads)
  gains = {
    "none": 0, "head": 2 * H, "full": H * (heads + kv_heads),
  }[config.qk_norm]  # fmt: skip
  return projections, gains


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Model FLOPs of forward and backward, per token.

  6 per matmul parameter, plus causal attention: scores and weighted values are
  4 * N * H FLOPs per query and key forward, on average seq_len / 2 keys, times
  3 for the backward pass (the convention of PaLM, Chowdhery et al. 2022, with
  the causal half). Recomputation by remat is not counted.
  """
  attention = 6 * config.num_layers * config.num_heads * config.head_dim
  return 6.0 * count(config).matmul_params + attention * seq_len
