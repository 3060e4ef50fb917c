# SPDX-License-Identifier: Apache-2.0
"""Norms of queries and keys, at the usual and at a high learning rate.

OLMoE (arXiv:2409.02060); Dehghani et al. 2023
(arXiv:2302.05442).
"""

from moejax.sweep import Sweep, grid


def get_sweep():
  """The norm is for stability, which a high learning rate asks for."""
  return Sweep(
    config="../../configs/tiny.py",
    points=grid(
      {
        "model.qk_norm": {"with": "full", "without": "none"},
        "optimizer.learning_rate": {"lr_3e-3": 3e-3, "lr_2e-2": 2e-2},
      }
    ),
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
  )
