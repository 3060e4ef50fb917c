# SPDX-License-Identifier: Apache-2.0
"""JetMoE-8B: 8.5 B parameters, 2.3 B active (Shen et al. 2024).

  moejax train --config=configs/jetmoe_8b.py --workdir=runs/jetmoe
  moejax train --config=configs/jetmoe_8b.py:tiny --workdir=runs/jetmoe_tiny

Published: 96 H100 for 13 to 14 days, 1 T tokens and 250 B of decay
(arXiv:2404.07413). `:tiny` is a minute on a laptop.

A pod for it; what it gives is in docs/pods.md:

  moejax plan --config=configs/jetmoe_8b.py --topology=v5p:4x8x8 \
    --config.parallel.data=4 --config.parallel.fsdp=64 \
    --config.model.remat=dots

Attention heads are experts too: queries and outputs of 2 of 8 experts around
one set of keys and values; both halves of a layer route, 8 experts top-2,
weights renormalised over the chosen. Warm-up, stable, exponential decay. The
balancing losses of its 48 routers are summed, with weights 0.01 and 0.001.

The second phase changes the mixture (more curated and instruction-like text)
when the decay begins, after 1 T of 1.25 T tokens; shares are those of the paper
(the second phase's table adds up to 99.7). Betas and epsilon of Adam are not
published.

Where sources differ: the paper says that the first and the last rate are a
tenth of the largest, while its formula of the warm-up, s / W of it, begins at
zero; here it is the formula. Weights are drawn with 0.01 in the released class
and with 0.02 in a table of OLMoE's paper; here it is the former. That draws are
cut at 3 standard deviations is the default of this code, not published.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 32000
  model.d_model = 2048
  model.num_layers = 24
  model.pattern = ("moa/moe",)
  model.num_heads = 32  # 16 of each of the 2 chosen experts
  model.num_kv_heads = 16
  model.head_dim = 128
  model.qk_norm = "none"
  model.norm_eps = 1e-6
  model.final_norm_eps = 1e-5
  model.rope_theta = 10000.0
  model.tie_embeddings = True
  model.init_std = 0.01
  model.moe.num_experts = 8
  model.moe.d_expert = 5632
  model.moe.router = "top_k(k=2, renormalize=True)"
  model.moe.output_bias = True
  model.remat = "full"

  config.loss.load_balance = 0.01
  config.loss.router_z = 0.001
  config.loss.router_reduction = "sum"

  optimizer = config.optimizer
  optimizer.learning_rate = 5e-4
  optimizer.weight_decay = 0.1
  optimizer.clip_norm = 1.0
  optimizer.schedule.name = "wsd"
  optimizer.schedule.warmup = 2500.0
  optimizer.schedule.decay = 59_605.0  # 250 B tokens
  optimizer.schedule.decay_shape = "exponential"
  optimizer.schedule.final = 0.1

  _mixtures(config)
  config.data.tokenizer = "tokenizers/jetmoe/tokenizer.json"
  config.data.seq_len = 4096
  config.train.batch_size = 1024
  config.train.num_steps = 298_024  # 1.25 T tokens
  config.checkpoint.every = 5000
  config.checkpoint.keep_every = 20_000  # to branch other decays from
  config.eval.every = 5000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _mixtures(config):
  """Shares in percent, of the first 1 T tokens and of the rest."""
  config.data.sources = (
    "data/refinedweb/*.jsonl.gz", "data/starcoder/*.jsonl.gz",
    "data/pile/*.jsonl.gz", "data/arxiv/*.jsonl.gz",
    "data/openwebmath/*.jsonl.gz", "data/pes2o/*.jsonl.gz",
    "data/wikipedia/*.jsonl.gz", "data/stackexchange/*.jsonl.gz",
    "data/instructions/*.jsonl.gz", "data/textbooks/*.jsonl.gz",
    "data/code_instructions/*.jsonl.gz", "data/math/*.jsonl.gz",
  )  # fmt: skip
  config.data.weights = (64.0, 25.0, 8.0, 1.0, 1.0, 1.0, *[0.0] * 6)
  curated = (39.8, 19.6, 5.1, 1.0, 0.0, 1.0, 6.7, 4.8, 7.3, 4.8, 3.8, 5.8)
  config.train.phases = (
    {"name": "stable", "tokens": 1e12},
    {"name": "decay", "options": {"data.weights": curated}},
  )


def _shrink(config):
  from tiny import mix_two, shrink_training

  shrink_training(config)
  mix_two(config)
  config.train.phases = (
    {"name": "stable", "steps": 96},
    {"name": "decay", "options": {"data.weights": (6.0, 4.0)}},
  )
  model = config.model
  model.d_model = 96
  model.num_layers = 3
  model.num_heads = 4
  model.num_kv_heads = 2
  model.head_dim = 32
  model.moe.num_experts = 5
  model.moe.d_expert = 112
