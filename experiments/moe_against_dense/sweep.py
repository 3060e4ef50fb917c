# SPDX-License-Identifier: Apache-2.0
"""Experts against one dense MLP, at equal active parameters.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep


def get_sweep():
  """2 of 8 experts of 128 channels, or all of one MLP of 256."""
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "dense": {"model.pattern": ("attention/mlp",), "model.d_mlp": 256},
      "moe": {},
    },
    common={"train.num_steps": 500, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
    baseline="dense",
  )
