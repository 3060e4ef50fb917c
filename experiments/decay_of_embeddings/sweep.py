# SPDX-License-Identifier: Apache-2.0
"""Weight decay of the embeddings, or not.

OLMoE (arXiv:2409.02060), of the input table; the output one is always decayed.
"""

from moejax.sweep import Sweep


def get_sweep():
  return Sweep(
    config="../../configs/tiny.py",
    points={
      "decayed": {"optimizer.no_decay": ()},
      "not_decayed": {"optimizer.no_decay": ("w_embed",)},
    },
    common={"train.num_steps": 200, "eval.sample_tokens": 0},
    seeds=(0, 1, 2),
  )
