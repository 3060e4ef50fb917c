# SPDX-License-Identifier: Apache-2.0
"""Weight decay of the norms' gains, or not.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep


def get_sweep():
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "decayed": {"optimizer.no_decay": ()},
      "not_decayed": {"optimizer.no_decay": ("scale",)},
    },
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
  )
