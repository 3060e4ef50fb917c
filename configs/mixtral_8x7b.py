# SPDX-License-Identifier: Apache-2.0
"""Mixtral-8x7B: 46.7 B parameters, 12.9 B active (Jiang et al. 2024).

  moejax train --config=configs/mixtral_8x7b.py --workdir=runs/mixtral
  moejax train --config=configs/mixtral_8x7b.py:tiny --workdir=runs/mixtral_tiny

8 experts top-2, renormalised over the chosen; no QK-norm; RoPE base 1e6
(arXiv:2401.04088).

The architecture is the published one. The recipe of its training is not public
in full; rates, batch and lengths here are a start for a study. `:tiny` is a
minute on a laptop.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 32000
  model.d_model = 4096
  model.num_layers = 32
  model.num_heads = 32
  model.num_kv_heads = 8
  model.head_dim = 128
  model.qk_norm = "none"
  model.norm_eps = 1e-5
  model.rope_theta = 1e6
  model.moe.num_experts = 8
  model.moe.d_expert = 14336
  model.moe.router = "top_k(k=2, renormalize=True)"
  model.remat = "full"

  # The hub's 0.02 weighs a loss that is k at balance (docs/losses.md).
  config.loss.load_balance = 0.02 * 2
  config.loss.router_z = 0.0
  config.data.sources = ("data/corpus/*.jsonl.gz",)
  config.data.tokenizer = "tokenizers/mixtral/tokenizer.json"
  config.data.seq_len = 4096
  config.train.batch_size = 1024
  config.train.num_steps = 250_000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _shrink(config):
  from tiny import shrink_training

  shrink_training(config)
  model = config.model
  model.d_model = 80
  model.num_layers = 3
  model.num_heads = 4
  model.num_kv_heads = 2
  model.head_dim = 28
  model.moe.num_experts = 5
  model.moe.d_expert = 132
