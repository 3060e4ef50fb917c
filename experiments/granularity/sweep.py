# SPDX-License-Identifier: Apache-2.0
"""Few large experts or many small ones, at equal parameters.

OLMoE (arXiv:2409.02060).
"""

from moejax.sweep import Sweep


def get_sweep():
  """1,024 channels in all, 256 of them for a token, in 4 to 32 experts."""
  points = {}
  for num_experts in (4, 8, 16, 32):
    k = num_experts // 4
    points[f"top_{k}_of_{num_experts}"] = {
      "model.moe.num_experts": num_experts,
      "model.moe.d_expert": 1024 // num_experts,
      "model.moe.router": f"top_k(k={k})",
    }
  return Sweep(
    config="../../configs/tiny.py",
    points=points,
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
  )
