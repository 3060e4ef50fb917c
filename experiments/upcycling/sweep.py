# SPDX-License-Identifier: Apache-2.0
"""Experts from a dense run's MLPs, or from scratch.

Komatsuzaki et al. 2022 (arXiv:2212.05055); OLMoE (arXiv:2409.02060).
`dense.sh` makes the runs that two of the points start from.
"""

from moejax.sweep import Sweep


def get_sweep():
  """Experts of the dense MLP's width; as long again as the dense run was."""
  start = "sweeps/upcycling_sources"
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "scratch": {},
      "upcycled": {"train.init_from": f"{start}/upcycled"},
      "upcycled_noise": {"train.init_from": f"{start}/noise"},
    },
    common={
      "train.num_steps": 200, "eval.sample_tokens": 0,
      "model.moe.d_expert": 256,
      "model.moe.router": "top_k(k=2, renormalize=True)",
    },
  )  # fmt: skip
