# SPDX-License-Identifier: Apache-2.0
"""Tensor names of Hunyuan-Large (and of hunyuan_v1_moe, without sharing)."""

from collections.abc import Iterable

from moejax.config import ModelConfig
from moejax.convert import rules
from moejax.convert.llama import TABLES
from moejax.convert.rules import Rule


def hunyuan(config: ModelConfig) -> Iterable[Rule]:
  D, E = config.d_model, config.moe.num_experts
  yield from rules.tables(*TABLES, config)
  for i, layer in enumerate(config.layers):
    path, prefix = rules.layer_path(config, i), f"model.layers.{i}"
    for ours, theirs in (
      ("attention_norm", "input_layernorm"),
      ("ffn_norm", "post_attention_layernorm"),
    ):
      yield rules.same(
        f"{prefix}.{theirs}.weight", (D,), (*path, ours, "scale")
      )
    yield from rules.attention(
      f"{prefix}.self_attn", config, (*path, "attention"), layer.has_kv,
      ("query_layernorm", "key_layernorm"),
    )  # fmt: skip
    moe = (*path, "moe")
    yield rules.linear(
      f"{prefix}.mlp.gate.wg.weight", (*moe, "w_router_DE"), (D, E), 1
    )
    if config.moe.num_shared_experts:
      yield from rules.mlp(
        f"{prefix}.mlp.shared_mlp",
        config.moe.num_shared_experts * config.moe.d_expert, config,
        (*moe, "shared"),
      )  # fmt: skip
    yield from rules.gated_experts(
      f"{prefix}.mlp.experts", "gate_proj", "up_proj", "down_proj", config, moe
    )
