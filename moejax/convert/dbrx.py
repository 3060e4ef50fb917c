# SPDX-License-Identifier: Apache-2.0
"""Tensor names of DBRX: fused Wqkv, flat experts."""

from collections.abc import Iterable

import numpy as np

from moejax.config import ModelConfig
from moejax.convert import rules
from moejax.convert.rules import Rule


def dbrx(config: ModelConfig) -> Iterable[Rule]:
  D, E, F = config.d_model, config.moe.num_experts, config.moe.d_expert
  yield from rules.tables(
    "transformer.wte.weight", "transformer.norm_f.weight", "lm_head.weight",
    config,
  )  # fmt: skip
  for i in range(config.num_layers):
    path, prefix = rules.layer_path(config, i), f"transformer.blocks.{i}"
    norms = f"{prefix}.norm_attn_norm"
    yield rules.same(
      f"{norms}.norm_1.weight", (D,), (*path, "attention_norm", "scale")
    )
    yield rules.same(
      f"{norms}.norm_2.weight", (D,), (*path, "ffn_norm", "scale")
    )
    yield from _attention(f"{norms}.attn", config, (*path, "attention"))
    moe = (*path, "moe")
    yield rules.linear(
      f"{prefix}.ffn.router.layer.weight", (*moe, "w_router_DE"), (D, E), 1
    )
    for ours, theirs in (("w_gate_EDF", "w1"), ("w_up_EDF", "v1")):
      yield rules.one(
        f"{prefix}.ffn.experts.mlp.{theirs}", (E * F, D), (*moe, ours),
        lambda w: w.reshape(E, F, D).swapaxes(1, 2),
        lambda x: x.swapaxes(1, 2).reshape(E * F, D),
      )  # fmt: skip
    # w2 is stored [in, out] already.
    yield rules.one(
      f"{prefix}.ffn.experts.mlp.w2", (E * F, D), (*moe, "w_down_EFD"),
      lambda w: w.reshape(E, F, D), lambda x: x.reshape(E * F, D),
    )  # fmt: skip


def _attention(prefix: str, config: ModelConfig, path) -> Iterable[Rule]:
  D, N, K, H = (
    config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
  )  # fmt: skip
  heads = (N, K, K)
  cuts = np.cumsum([n * H for n in heads])[:-1]
  yield Rule(
    (f"{prefix}.Wqkv.weight",), ((sum(heads) * H, D),),
    tuple((*path, name) for name in ("w_q_DNH", "w_k_DKH", "w_v_DKH")),
    lambda ws: [
      w.T.reshape(D, n, H) for w, n in zip(np.split(ws[0], cuts), heads)
    ],
    lambda xs: [np.concatenate([x.reshape(D, -1).T for x in xs])],
  )  # fmt: skip
  yield rules.linear(
    f"{prefix}.out_proj.weight", (*path, "w_o_NHD"), (N, H, D), 2
  )
