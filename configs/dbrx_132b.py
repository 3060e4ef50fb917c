# SPDX-License-Identifier: Apache-2.0
"""DBRX: 132 B parameters, 36 B active (Databricks, March 2024).

  moejax train --config=configs/dbrx_132b.py --workdir=runs/dbrx
  moejax train --config=configs/dbrx_132b.py:tiny --workdir=runs/dbrx_tiny

Published: 3072 H100, 12 T tokens of text and code at up to 32 K tokens a row.
`:tiny` is a minute on a laptop.

A pod for it, with as many tokens a batch in shorter rows; what it gives is in
docs/pods.md:

  moejax plan --config=configs/dbrx_132b.py --topology=v5p:8x8x16 \
    --config.parallel.data=4 --config.parallel.fsdp=256 \
    --config.data.seq_len=4096 --config.train.batch_size=4096 \
    --config.model.remat=experts

16 experts top-4, renormalised; LayerNorm without bias; queries, keys and values
clipped to +-8; RoPE base 500,000; balancing loss 0.05, no z-loss. Its data
followed a curriculum, the best of it last (press reports: the last week of
about two months). Shares, optimizer, learning rate and batch are not published:
those here are a start for a study, not the recipe. Nor is that draws of weights
are cut at 3 standard deviations, the default of this code.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 100352
  model.d_model = 6144
  model.num_layers = 40
  model.num_heads = 48
  model.num_kv_heads = 8
  model.head_dim = 128
  model.qk_norm = "none"
  model.clip_qkv = 8.0
  model.norm = "layer"
  model.norm_eps = 1e-5
  model.rope_theta = 500000.0
  model.moe.num_experts = 16
  model.moe.d_expert = 10752
  model.moe.router = "top_k(k=4, renormalize=True)"
  model.remat = "full"

  config.loss.load_balance = 0.05
  config.loss.router_z = 0.0

  config.optimizer.learning_rate = 2e-4  # not published
  config.optimizer.schedule.warmup = 2000.0
  config.data.sources = (
    "data/dbrx/web/*.jsonl.gz", "data/dbrx/code/*.jsonl.gz",
    "data/dbrx/curated/*.jsonl.gz",
  )  # fmt: skip
  config.data.weights = (70.0, 25.0, 5.0)
  config.data.tokenizer = "tokenizers/dbrx/tokenizer.json"
  config.data.seq_len = 32768
  config.train.batch_size = 512
  config.train.num_steps = 715_000  # 12 T tokens
  config.train.phases = (
    {"name": "broad", "tokens": 10.5e12},
    {"name": "curated", "options": {"data.weights": (30.0, 30.0, 40.0)}},
  )
  config.checkpoint.every = 2000
  config.eval.every = 2000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _shrink(config):
  from tiny import mix_two, shrink_training

  shrink_training(config)
  mix_two(config)
  config.train.phases = (
    {"name": "broad", "steps": 105},
    {"name": "curated", "options": {"data.weights": (3.0, 7.0)}},
  )
  model = config.model
  model.d_model = 96
  model.num_layers = 3
  model.num_heads = 6
  model.num_kv_heads = 2
  model.head_dim = 16
  model.moe.num_experts = 9
  model.moe.d_expert = 72
