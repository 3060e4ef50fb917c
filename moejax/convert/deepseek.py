# SPDX-License-Identifier: Apache-2.0
"""Tensor names of DeepSeek-V3: latent attention, a bias on each router.

The hub rotates neighbouring channels (2i, 2i + 1) of queries and keys; ours
rotates halves. The channels that are rotated are put in that order on the way
in, in queries and keys alike, so no score changes.
"""

from collections.abc import Iterable

import numpy as np

from moejax.config import ModelConfig
from moejax.convert import rules
from moejax.convert.llama import TABLES
from moejax.convert.rules import Rule
from moejax.routing.balance import NAME


def deepseek_v3(config: ModelConfig) -> Iterable[Rule]:
  D = config.d_model
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
    yield from _attention(f"{prefix}.self_attn", config, (*path, "attention"))
    if layer.ffn == "mlp":
      yield from rules.mlp(
        f"{prefix}.mlp", config.d_mlp, config, (*path, "mlp")
      )
    else:
      yield from _moe(f"{prefix}.mlp", config, (*path, "moe"))


def _attention(prefix: str, config: ModelConfig, path) -> Iterable[Rule]:
  D, N, mla = config.d_model, config.num_heads, config.mla
  H, Z = mla.nope_dim + mla.rope_dim, mla.kv_rank
  if mla.q_rank:
    yield rules.linear(
      f"{prefix}.q_a_proj.weight", (*path, "w_q_down_DZ"), (D, mla.q_rank), 1
    )
    yield rules.same(
      f"{prefix}.q_a_layernorm.weight", (mla.q_rank,), (*path, "q_norm")
    )
  name, leaf, width = (
    ("q_b_proj", "w_q_up_ZNH", mla.q_rank)
    if mla.q_rank
    else ("q_proj", "w_q_DNH", D)
  )
  yield rules.one(
    f"{prefix}.{name}.weight", (N * H, width), (*path, leaf),
    lambda w: _halves(w.T.reshape(width, N, H), mla.rope_dim),
    lambda x: _pairs(x, mla.rope_dim).reshape(width, -1).T,
  )  # fmt: skip
  yield Rule(
    (f"{prefix}.kv_a_proj_with_mqa.weight",), ((Z + mla.rope_dim, D),),
    ((*path, "w_kv_down_DZ"), (*path, "w_k_rope_DH")),
    lambda ws: [ws[0][:Z].T, _halves(ws[0][Z:].T, mla.rope_dim)],
    lambda xs: [np.concatenate([xs[0].T, _pairs(xs[1], mla.rope_dim).T])],
  )  # fmt: skip
  yield rules.same(f"{prefix}.kv_a_layernorm.weight", (Z,), (*path, "kv_norm"))
  both = mla.nope_dim + mla.v_dim
  yield Rule(
    (f"{prefix}.kv_b_proj.weight",), ((N * both, Z),),
    ((*path, "w_k_up_ZNH"), (*path, "w_v_up_ZNH")),
    lambda ws: np.split(ws[0].T.reshape(Z, N, both), [mla.nope_dim], axis=-1),
    lambda xs: [np.concatenate(xs, -1).reshape(Z, -1).T],
  )  # fmt: skip
  yield rules.linear(
    f"{prefix}.o_proj.weight", (*path, "w_o_NHD"), (N, mla.v_dim, D), 2
  )


def _moe(prefix: str, config: ModelConfig, path) -> Iterable[Rule]:
  D, moe = config.d_model, config.moe
  E = moe.num_experts
  yield rules.linear(f"{prefix}.gate.weight", (*path, "w_router_DE"), (D, E), 1)
  yield rules.same(
    f"{prefix}.gate.e_score_correction_bias", (E,),
    ("router_state", *path[1:], NAME),
  )  # fmt: skip
  if moe.num_shared_experts:
    yield from rules.mlp(
      f"{prefix}.shared_experts", moe.num_shared_experts * moe.d_expert,
      config, (*path, "shared"),
    )  # fmt: skip
  yield from rules.gated_experts(
    f"{prefix}.experts", "gate_proj", "up_proj", "down_proj", config, path
  )


def _halves(x: np.ndarray, rope_dim: int) -> np.ndarray:
  """The last `rope_dim` channels: even ones first, then odd ones."""
  rest, rotated = np.split(x, [x.shape[-1] - rope_dim], axis=-1)
  return np.concatenate([rest, rotated[..., ::2], rotated[..., 1::2]], -1)


def _pairs(x: np.ndarray, rope_dim: int) -> np.ndarray:
  """The way back from `_halves`."""
  rest, rotated = np.split(x, [x.shape[-1] - rope_dim], axis=-1)
  first, second = np.split(rotated, 2, axis=-1)
  pairs = np.stack([first, second], -1).reshape(rotated.shape)
  return np.concatenate([rest, pairs], -1)
