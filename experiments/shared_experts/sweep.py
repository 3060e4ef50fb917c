# SPDX-License-Identifier: Apache-2.0
"""An expert that every token visits, in place of a routed one.

OLMoE (arXiv:2409.02060); DeepSeekMoE (arXiv:2401.06066).
"""

from moejax.sweep import Sweep


def get_sweep():
  """16 experts of 64 channels: 4 of 16 routed, or 3 of 15 and one shared."""
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "routed": {
        "model.moe.num_experts": 16, "model.moe.router": "top_k(k=4)"
      },
      "one_shared": {
        "model.moe.num_experts": 15, "model.moe.router": "top_k(k=3)",
        "model.moe.num_shared_experts": 1,
      },
    },
    common={
      "train.num_steps": 200, "eval.sample_tokens": 0,
      "model.moe.d_expert": 64,
    },
    seeds=(0, 1, 2),
  )  # fmt: skip
