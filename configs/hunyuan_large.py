# SPDX-License-Identifier: Apache-2.0
"""Hunyuan-Large: 389 B parameters, 52 B active (Sun et al. 2024).

  moejax train --config=configs/hunyuan_large.py --workdir=runs/hy
  moejax train --config=configs/hunyuan_large.py:tiny --workdir=runs/hy_tiny

Published: 7 T tokens, the last 5% annealed to a tenth of the peak rate
(arXiv:2411.02265); hardware, rates and batch are not, so those here are a start
for a study. `:tiny` is a minute on a laptop.

A pod for it; what it gives is in docs/pods.md:

  moejax plan --config=configs/hunyuan_large.py --topology=v5p:8x8x16 \
    --config.parallel.data=4 --config.parallel.fsdp=16 \
    --config.parallel.expert=16 --config.parallel.receive_factor=2.0 \
    --config.model.remat=exchange --config.parallel.overlap=other

One shared expert and 16 routed ones, top-1; in training, tokens beyond an
expert's capacity go at random to those with room (recycle routing). Every
second layer reads the keys and values of the one before (cross-layer
attention), 8 heads of them for 80 query heads; QK-norm after RoPE.

Four phases: 95% of 7 T tokens, annealing on the best data, then about 10 B
tokens each of rows of 32 K and 256 K, a quarter of them long documents; at
256 K RoPE's base is raised to 1e9 (1.34e9 as released, by NTK's alpha). In the
main part the published rate decays slowly, by how much is not said: here it is
constant. Nor is the rate of the long phases: here it stays where the annealing
ends.
"""

import math

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 128512
  model.d_model = 6400
  model.num_layers = 64
  model.pattern = ("attention/moe", "shared_kv/moe")
  model.num_heads = 80
  model.num_kv_heads = 8
  model.head_dim = 80
  model.qk_norm = "head_after_rope"
  model.norm_eps = 1e-5
  model.rope_theta = 10000.0
  model.rope_scaling = "ntk(alpha=100000.0)"
  model.tie_embeddings = True
  model.moe.num_experts = 16
  model.moe.d_expert = 18304
  # A row's tokens share the places; the published runs' factor is not known.
  model.moe.router = "recycle(group_size=8192, capacity_factor=1.0)"
  model.moe.num_shared_experts = 1
  model.remat = "full"

  config.loss.load_balance = 0.01  # not published
  config.loss.router_z = 0.0

  config.optimizer.learning_rate = 2e-4  # not published
  config.optimizer.expert_rate = "batch_share(x=0.26)"  # 0.31 of the rest's
  config.optimizer.schedule.name = "wsd"
  config.optimizer.schedule.decay = 0.05
  config.optimizer.schedule.final = 0.1
  config.data.sources = (
    "data/hunyuan/all/*.jsonl.gz", "data/hunyuan/best/*.jsonl.gz",
    "data/hunyuan/long/*.jsonl.gz",
  )  # fmt: skip
  config.data.weights = (1.0, 0.0, 0.0)
  config.data.tokenizer = "tokenizers/hunyuan/tokenizer.json"
  config.data.seq_len = 8192
  config.train.batch_size = 1024
  batch = 1024 * 8192
  annealed = math.ceil(7e12 / batch)
  config.train.num_steps = annealed + 2 * math.ceil(10e9 / batch)
  config.train.phases = phases(
    steps=(round(0.95 * annealed), annealed - round(0.95 * annealed),
           math.ceil(10e9 / batch)),
    rows=((32768, 256), (262144, 32)), rate=2e-5, mixed=(0.0, 3.0, 1.0),
    best=(0.0, 1.0, 0.0),
  )  # fmt: skip
  config.checkpoint.every = 2000
  config.checkpoint.keep_every = 100_000  # to branch other decays from
  config.eval.every = 2000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def phases(steps, rows, rate, mixed, best):
  """The main part, the annealing, and two of longer rows.

  Args:
    steps: of the first three; the last goes on to the end.
    rows: (tokens, rows a batch) of the two long ones.
    rate: of the long ones.
    mixed: weights of the sources there, a quarter of them long documents.
    best: in the annealing.
  """
  # The config is the released model's, whose base is that of the last phase.
  short = {"model.rope_scaling": "none"}
  constant = {
    "data.weights": mixed,
    "optimizer.learning_rate": rate,
    "optimizer.schedule.warmup": 0.0,
    "optimizer.schedule.decay": 0.0,
  }
  shapes = [
    {"data.seq_len": tokens, "train.batch_size": count}
    for tokens, count in rows
  ]
  return (
    {"name": "main", "steps": steps[0], "options": short},
    {
      "name": "anneal",
      "steps": steps[1],
      "options": short | {"data.weights": best},
    },
    {"name": "32k", "steps": steps[2], "options": short | constant | shapes[0]},
    {"name": "256k", "options": constant | shapes[1]},
  )


def _shrink(config):
  from tiny import mix_two, shrink_training

  shrink_training(config)
  mix_two(config)
  config.train.phases = phases(
    steps=(86, 10, 12), rows=((512, 4), (1024, 2)), rate=3e-4,
    mixed=(3.0, 1.0), best=(1.0, 1.0),
  )  # fmt: skip
  model = config.model
  model.d_model = 96
  model.num_layers = 4
  model.num_heads = 6
  model.num_kv_heads = 2
  model.head_dim = 20
  model.moe.num_experts = 7
  model.moe.d_expert = 88
  model.moe.router = "recycle(group_size=256, capacity_factor=1.0)"
