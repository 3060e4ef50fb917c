# SPDX-License-Identifier: Apache-2.0
"""Tensor names of the Llama-like families: OLMoE, FlexOlmo, Qwen3-MoE, Mixtral.

They differ in names, in where norms stand, and in what the config says.
"""

from collections.abc import Iterable

from moejax.config import ModelConfig
from moejax.convert import rules
from moejax.convert.rules import Rule

TABLES = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def olmoe(config: ModelConfig) -> Iterable[Rule]:
  """OLMoE; Qwen3-MoE has the same names."""
  return _llama(config, "input_layernorm", "post_attention_layernorm")


def flex_olmo(config: ModelConfig) -> Iterable[Rule]:
  """FlexOlmo: both norms follow their layer."""
  return _llama(
    config, "post_attention_layernorm", "post_feedforward_layernorm"
  )


def mixtral(config: ModelConfig) -> Iterable[Rule]:
  return _llama(
    config, "input_layernorm", "post_attention_layernorm",
    "block_sparse_moe", ("w1", "w3", "w2"),
  )  # fmt: skip


def _llama(
  config: ModelConfig,
  attention_norm: str,
  ffn_norm: str,
  moe: str = "mlp",
  parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterable[Rule]:
  D, E = config.d_model, config.moe.num_experts
  yield from rules.tables(*TABLES, config)
  for i, layer in enumerate(config.layers):
    path, prefix = rules.layer_path(config, i), f"model.layers.{i}"
    for ours, theirs in (
      ("attention_norm", attention_norm), ("ffn_norm", ffn_norm)
    ):  # fmt: skip
      yield rules.same(
        f"{prefix}.{theirs}.weight", (D,), (*path, ours, "scale")
      )
    yield from rules.attention(
      f"{prefix}.self_attn", config, (*path, "attention")
    )
    if layer.ffn == "mlp":
      yield from rules.mlp(
        f"{prefix}.mlp", config.d_mlp, config, (*path, "mlp")
      )
      continue
    yield rules.linear(
      f"{prefix}.{moe}.gate.weight", (*path, "moe", "w_router_DE"), (D, E), 1
    )
    yield from rules.gated_experts(
      f"{prefix}.{moe}.experts", *parts, config, (*path, "moe")
    )
