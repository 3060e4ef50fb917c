# SPDX-License-Identifier: Apache-2.0
"""Mixture of attention heads, or the same heads for all tokens.

JetMoE (arXiv:2404.07413); Zhang et al. 2022 (arXiv:2210.05144).
"""

from moejax.sweep import Sweep


def get_sweep():
  """4 query heads a token over 2 of keys: 2 of 8 experts' or fixed ones."""
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "fixed_heads": {"model.pattern": ("attention/moe",)},
      "attention_experts": {"model.pattern": ("moa/moe",)},
    },
    common={
      "train.num_steps": 200, "eval.sample_tokens": 0,
      "model.qk_norm": "none", "model.num_kv_heads": 2,
      "model.moe.router": "top_k(k=2, renormalize=True)",
    },
    seeds=(0, 1, 2),
  )  # fmt: skip
