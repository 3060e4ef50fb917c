# SPDX-License-Identifier: Apache-2.0
"""Who chooses: tokens their experts, or experts their tokens.

OLMoE (arXiv:2409.02060); Zhou et al. 2022 (arXiv:2202.09368).
"""

from moejax.sweep import Sweep


def get_sweep():
  """Two experts a token, exactly or in the mean; a row competes with itself."""
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "token_choice": {"model.moe.router": "top_k(k=2)"},
      "expert_choice": {
        "model.moe.router": "expert_choice(k=2, group_size=256)",
        "loss.load_balance": 0.0,  # it is balanced as it is
      },
    },
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
    baseline="token_choice",
  )
