# SPDX-License-Identifier: Apache-2.0
"""Qwen3-30B-A3B: 30.5 B parameters, 3.4 B active (Qwen team 2025).

  moejax train --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3
  moejax train --config=configs/qwen3_30b_a3b.py:tiny --workdir=runs/qwen3_tiny

128 experts top-8, renormalised over the chosen, none shared; QK-norm per head
before RoPE; heads of 128, wider in all than the model (arXiv:2505.09388).

The architecture is the published one. The recipe of its training is not public
in full; rates, batch and lengths here are a start for a study. `:tiny` is a
minute on a laptop.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 151936
  model.d_model = 2048
  model.num_layers = 48
  model.num_heads = 32
  model.num_kv_heads = 4
  model.head_dim = 128
  model.qk_norm = "head"
  model.norm_eps = 1e-6
  model.rope_theta = 1e6
  model.moe.num_experts = 128
  model.moe.d_expert = 768
  model.moe.router = "top_k(k=8, renormalize=True)"
  model.remat = "full"

  # The hub's 0.001 weighs a loss that is k at balance (docs/losses.md).
  config.loss.load_balance = 0.001 * 8
  config.loss.load_balance_scope = "global"
  config.loss.router_z = 0.0
  config.data.sources = ("data/corpus/*.jsonl.gz",)
  config.data.tokenizer = "tokenizers/qwen3/tokenizer.json"
  config.data.seq_len = 4096
  config.train.batch_size = 1024
  config.train.num_steps = 500_000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _shrink(config):
  from tiny import shrink_training

  shrink_training(config)
  model = config.model
  model.d_model = 72
  model.num_layers = 3
  model.num_heads = 8
  model.num_kv_heads = 2
  model.head_dim = 20
  model.moe.num_experts = 16
  model.moe.d_expert = 36
  model.moe.router = "top_k(k=4, renormalize=True)"
