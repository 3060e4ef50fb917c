# SPDX-License-Identifier: Apache-2.0
"""A normal initialisation, cut at three standard deviations or not.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep


def get_sweep():
  return Sweep(
    config="../../configs/tiny.py",
    points={"cut": {"model.init_cut": 3.0}, "normal": {"model.init_cut": 0.0}},
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
  )
