# SPDX-License-Identifier: Apache-2.0
"""AdamW's epsilon.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep, grid


def get_sweep():
  return Sweep(
    config="../../configs/tiny.py",
    points=grid(
      {"optimizer.eps": {"eps_1e-8": 1e-8, "eps_1e-6": 1e-6, "eps_1e-5": 1e-5}}
    ),
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
  )
