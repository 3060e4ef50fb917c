# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs from the config alone, by formula."""

import dataclasses
from typing import Self

from moejax.config import LayerConfig, ModelConfig
from moejax.routing import resolve
from moejax.routing.balance import has_bias
from moejax.routing.inputs import projections_of


@dataclasses.dataclass(frozen=True)
class Counts:
  """Parameters of a model or of a part of it.

  Attributes:
    num_params: all, the biases of routers that have them included.
    num_active_params: those that one token uses, embedding tables included
      (tied: once), as the published systems count them.
    matmul_params: active parameters that multiply a token: no norms, no input
      table.
  """

  num_params: int
  num_active_params: int
  matmul_params: int

  def __add__(self, other: Self) -> Self:
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
    return Counts(*(x + y for x, y in pairs))


NOTHING = Counts(0, 0, 0)


def count(config: ModelConfig) -> Counts:
  """Counts of the model; `tests/models` compares them with the real tree."""
  return sum(count_parts(config).values(), NOTHING)


def count_parts(config: ModelConfig) -> dict[str, Counts]:
  """Counts by part, in the order of the data; absent parts are left out."""
  table = config.vocab_size * config.d_model
  found = {"input table": Counts(table, table, table * config.tie_embeddings)}
  for layer in config.layers:
    for name, counts in (*_mixer(config, layer), *_ffn(config, layer)):
      found[name] = (found[name] if name in found else NOTHING) + counts
  norms = (2 * config.num_layers + 1) * config.d_model
  found["norms"] = Counts(norms, norms, 0)
  if not config.tie_embeddings:
    found["output table"] = _always(table)
  return {name: c for name, c in found.items() if c.num_params}


def kv_bytes_per_token(config: ModelConfig) -> int:
  """Bytes of the KV cache that one token takes in all layers."""
  floats = 0
  for layer in config.layers:
    if layer.has_kv:
      heads, *widths = config.cache_shape(layer)
      floats += heads * sum(widths)
  return floats * dtype_bytes(config)


def dtype_bytes(config: ModelConfig) -> int:
  return 2 if config.dtype == "bfloat16" else 4


def _always(weights: int) -> Counts:
  """Weights that multiply every token."""
  return Counts(weights, weights, weights)


def _routed(config: ModelConfig, expert: int) -> Counts:
  """Experts of `expert` weights, of which a token visits a few."""
  active = config.moe.experts_per_token * expert
  return Counts(config.moe.num_experts * expert, active, active)


def _bias(config: ModelConfig) -> tuple[str, Counts]:
  size = config.d_model * config.moe.output_bias
  return "biases", Counts(size, size, 0)


def _mixer(config: ModelConfig, layer: LayerConfig):
  """(part, counts) of what mixes tokens."""
  D, H = config.d_model, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads
  keys = 2 * D * H * kv_heads
  if layer.mixer == "moa":
    yield "attention's keys, values", _always(keys)
    yield "attention's experts", _routed(config, 2 * D * H * kv_heads)
    yield _routers(config)
    yield _router_biases(config)
    yield _bias(config)
    return
  if layer.mixer == "mla":
    yield from _latent(config)
    return
  yield "attention", _always(2 * D * H * heads + layer.has_kv * keys)
  gains = {
    "none": 0, "head": 2 * H, "head_after_rope": 2 * H,
    "full": H * (heads + kv_heads),
  }[config.qk_norm]  # fmt: skip
  yield "QK-norms", Counts(gains, gains, 0)


def _latent(config: ModelConfig):
  D, N, mla = config.d_model, config.num_heads, config.mla
  H = mla.nope_dim + mla.rope_dim
  queries = mla.q_rank * (D + N * H) if mla.q_rank else D * N * H
  latent = D * (mla.kv_rank + mla.rope_dim)
  heads = N * (mla.kv_rank * (mla.nope_dim + mla.v_dim) + mla.v_dim * D)
  yield "attention", _always(queries + latent + heads)
  gains = mla.q_rank + mla.kv_rank
  yield "latents' norms", Counts(gains, gains, 0)


def _ffn(config: ModelConfig, layer: LayerConfig):
  """(part, counts) of what works on each token alone."""
  D, moe = config.d_model, config.moe
  if layer.ffn == "mlp":
    yield "dense MLPs", _always(3 * D * config.d_mlp)
    return
  expert = 3 * D * moe.d_expert
  yield "routed experts", _routed(config, expert)
  yield "shared experts", _always(moe.num_shared_experts * expert)
  yield _routers(config)
  yield _router_biases(config)
  yield _bias(config)


def _routers(config: ModelConfig) -> tuple[str, Counts]:
  """The logits of each expert, and what further ones the router asks for."""
  E = config.moe.num_experts
  further = projections_of(resolve(config.moe.router_spec), E)
  return "routers", _always(config.d_model * (E + sum(further.values())))


def _router_biases(config: ModelConfig) -> tuple[str, Counts]:
  """State, which no gradient reaches, but published sizes count it."""
  biased = has_bias(resolve(config.moe.router_spec))
  size = config.moe.num_experts * biased
  return "routers' biases", Counts(size, size, 0)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Model FLOPs of forward and backward, per token.

  6 per matmul parameter, plus causal attention: scores and weighted values are
  4 * N * H FLOPs per query and key forward, on average seq_len / 2 keys, times
  3 for the backward pass (the convention of PaLM, Chowdhery et al. 2022, with
  the causal half). Recomputation by remat is not counted.
  """
  width = sum(config.score_and_value_dims) / 2
  attention = 6 * config.num_layers * config.num_heads * width
  return 6.0 * count(config).matmul_params + attention * seq_len
