# SPDX-License-Identifier: Apache-2.0
"""What the router z-loss does.

OLMoE (arXiv:2409.02060); Zoph et al. 2022 (arXiv:2202.08906).
"""

from moejax.sweep import Sweep


def get_sweep():
  return Sweep(
    config="../../configs/tiny.py",
    points={"none": {"loss.router_z": 0.0}, "z_loss": {"loss.router_z": 0.001}},
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
    baseline="z_loss",
  )
