# SPDX-License-Identifier: Apache-2.0
"""What the load-balancing loss is for.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep


def get_sweep():
  """None, OLMoE's over the global batch, and the same over each sequence."""
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "none": {"loss.load_balance": 0.0},
      "global": {"loss.load_balance": 0.01},
      "sequence": {
        "loss.load_balance": 0.01,
        "loss.load_balance_scope": "sequence",
      },
    },
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    baseline="global",
  )
