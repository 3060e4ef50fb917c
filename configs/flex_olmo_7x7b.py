# SPDX-License-Identifier: Apache-2.0
"""FlexOlmo-7x7B-1T: 33.3 B parameters, 24.6 B active (Shi et al. 2025).

  moejax train --config=configs/flex_olmo_7x7b.py --workdir=runs/flex_olmo
  moejax train --config=configs/flex_olmo_7x7b.py:tiny --workdir=runs/flex_tiny

7 experts top-5, not renormalised, each trained apart on its own data and merged
(arXiv:2507.07024). Norms stand on the outputs of attention and experts, none on
their inputs; QK-norm over all heads at once.

The architecture is the published one. The recipe of its training is not public
in full; rates, batch and lengths here are a start for a study. `:tiny` is a
minute on a laptop.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 100352
  model.d_model = 4096
  model.num_layers = 32
  model.num_heads = 32
  model.num_kv_heads = 32
  model.head_dim = 128
  model.qk_norm = "full"
  model.norm_position = "post"
  model.norm_eps = 1e-6
  model.rope_theta = 500000.0
  model.moe.num_experts = 7
  model.moe.d_expert = 11008
  model.moe.router = "top_k(k=5)"
  model.remat = "full"

  config.loss.load_balance = 0.01
  config.loss.router_z = 0.0
  config.data.sources = ("data/corpus/*.jsonl.gz",)
  config.data.tokenizer = "tokenizers/flex_olmo/tokenizer.json"
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
  model.num_kv_heads = 4
  model.head_dim = 20
  model.moe.num_experts = 7
  model.moe.d_expert = 60
