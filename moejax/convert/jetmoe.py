# SPDX-License-Identifier: Apache-2.0
"""Tensor names of JetMoE: stacked experts, in attention too."""

from collections.abc import Iterable

import numpy as np

from moejax.config import ModelConfig
from moejax.convert import rules
from moejax.convert.llama import TABLES
from moejax.convert.rules import Rule


def jetmoe(config: ModelConfig) -> Iterable[Rule]:
  D = config.d_model
  yield from rules.tables(*TABLES, config)
  for i in range(config.num_layers):
    path, prefix = rules.layer_path(config, i), f"model.layers.{i}"
    for ours, theirs in (
      ("attention_norm", "input_layernorm"),
      ("ffn_norm", "post_attention_layernorm"),
    ):
      yield rules.same(
        f"{prefix}.{theirs}.weight", (D,), (*path, ours, "scale")
      )
    yield from _attention(f"{prefix}.self_attention", config, path)
    yield from _mlp(f"{prefix}.mlp", config, (*path, "moe"))


def _attention(prefix: str, config: ModelConfig, path) -> Iterable[Rule]:
  D, K, H = config.d_model, config.num_kv_heads, config.head_dim
  E, M = config.moe.num_experts, K * H
  path = (*path, "attention")
  experts = f"{prefix}.experts"
  yield rules.linear(
    f"{experts}.router.layer.weight", (*path, "w_router_DE"), (D, E), 1
  )
  # Both are square at published size: a forgotten swap would load.
  yield rules.one(
    f"{experts}.input_linear.weight", (E, M, D), (*path, "w_q_EDKH"),
    lambda w: w.swapaxes(1, 2).reshape(E, D, K, H),
    lambda x: x.reshape(E, D, M).swapaxes(1, 2),
  )  # fmt: skip
  yield rules.one(
    f"{experts}.output_linear.weight", (E, D, M), (*path, "w_o_EKHD"),
    lambda w: w.swapaxes(1, 2).reshape(E, K, H, D),
    lambda x: x.reshape(E, M, D).swapaxes(1, 2),
  )  # fmt: skip
  yield rules.same(f"{experts}.bias", (D,), (*path, "bias_D"))
  yield Rule(
    (f"{prefix}.kv_proj.weight",), ((2 * M, D),),
    ((*path, "w_k_DKH"), (*path, "w_v_DKH")),
    lambda ws: [w.T.reshape(D, K, H) for w in np.split(ws[0], 2)],
    lambda xs: [np.concatenate([x.reshape(D, M).T for x in xs])],
  )  # fmt: skip


def _mlp(prefix: str, config: ModelConfig, path) -> Iterable[Rule]:
  D, E, F = config.d_model, config.moe.num_experts, config.moe.d_expert
  yield rules.linear(
    f"{prefix}.router.layer.weight", (*path, "w_router_DE"), (D, E), 1
  )
  yield Rule(
    (f"{prefix}.input_linear.weight",), ((E, 2 * F, D),),
    ((*path, "w_gate_EDF"), (*path, "w_up_EDF")),
    lambda ws: [w.swapaxes(1, 2) for w in np.split(ws[0], 2, axis=1)],
    lambda xs: [np.concatenate([x.swapaxes(1, 2) for x in xs], axis=1)],
  )  # fmt: skip
  yield rules.one(
    f"{prefix}.output_linear.weight", (E, D, F), (*path, "w_down_EFD"),
    lambda w: w.swapaxes(1, 2), lambda x: x.swapaxes(1, 2),
  )  # fmt: skip
  yield rules.same(f"{prefix}.bias", (D,), (*path, "bias_D"))
