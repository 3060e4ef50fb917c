# SPDX-License-Identifier: Apache-2.0
"""OLMoE-1B-7B: 6.9 B parameters, 1.3 B active (Muennighoff et al. 2024).

  moejax train --config=configs/olmoe_1b_7b.py --workdir=runs/olmoe
  moejax train --config=configs/olmoe_1b_7b.py:tiny --workdir=runs/olmoe_tiny

Published: 256 H100, about 10 days for 5.03 T tokens, 23,600 tokens/s a GPU
(arXiv:2409.02060). `:tiny` is a minute on a laptop.

A pod for it; what it gives is in docs/pods.md:

  moejax plan --config=configs/olmoe_1b_7b.py --topology=v5p:4x8x8 \
    --config.parallel.fsdp=256 --config.model.remat=dots

64 experts, top-8 of the softmax over all, not renormalised; QK-norm over all
heads at once; no shared expert. Three phases: a cosine to a tenth over 5 T
tokens, as planned; flat from there to 5.03 T; then annealing: 100 B tokens of
the same data, shuffled anew, linearly from there to zero (the released config
starts at 4e-5, an appendix of the paper says 5e-4).

The data is OLMoE-mix as local files, in the paper's shares (1.3 epochs of it in
all), and the tokenizer that of the released model; both are named below, you
bring them.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 50304  # 50280 in use, padded
  model.d_model = 2048
  model.num_layers = 16
  model.num_heads = 16
  model.num_kv_heads = 16
  model.head_dim = 128
  model.qk_norm = "full"
  model.norm_eps = 1e-5
  model.rope_theta = 10000.0
  model.moe.num_experts = 64
  model.moe.d_expert = 1024
  model.moe.router = "top_k(k=8)"
  model.remat = "full"

  config.loss.load_balance = 0.01
  config.loss.router_z = 0.001

  optimizer = config.optimizer
  optimizer.learning_rate = 4e-4
  optimizer.b2 = 0.95
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.1  # of everything, norms and embeddings too
  optimizer.clip_norm = 1.0
  optimizer.schedule.name = "cosine"
  optimizer.schedule.warmup = 2500.0
  optimizer.schedule.final = 0.1

  _mixture(config)
  config.data.tokenizer = "tokenizers/olmoe/tokenizer.json"
  config.data.seq_len = 4096
  config.train.batch_size = 1024
  config.train.num_steps = 1_223_842
  cosine = 1_192_093  # 5 T tokens, its t_max
  config.train.phases = (
    {"name": "main", "steps": cosine},
    {"name": "flat", "steps": 1_200_000 - cosine, "options": constant(4e-5)},
    {"name": "anneal", "options": annealing(4e-5)},
  )
  config.checkpoint.every = 5000
  config.checkpoint.keep_every = 5000  # all 244 are published
  config.eval.every = 5000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _mixture(config):
  """OLMoE-mix, weights in billions of tokens: 94.9% of them DCLM."""
  tokens = {
    "dclm": 3860.0, "starcoder": 101.0, "pes2o": 57.2, "arxiv": 21.1,
    "openwebmath": 12.7, "algebraic_stack": 12.6, "wiki": 3.69,
  }  # fmt: skip
  config.data.sources = tuple(f"data/{name}/*.jsonl.gz" for name in tokens)
  config.data.weights = tuple(tokens.values())


def constant(learning_rate):
  """The end of the cosine, kept; the data goes on."""
  return {
    "optimizer.learning_rate": learning_rate,
    "optimizer.schedule.name": "wsd",
    "optimizer.schedule.warmup": 0.0,
    "optimizer.schedule.decay": 0.0,
  }


def annealing(learning_rate):
  """From the end of the cosine to zero, on the data in another order."""
  return {
    "data.order": 42,
    "optimizer.learning_rate": learning_rate,
    "optimizer.schedule.name": "linear",
    "optimizer.schedule.warmup": 0.0,
    "optimizer.schedule.final": 0.0,
  }


def _shrink(config):
  from tiny import shrink_training

  shrink_training(config)
  config.train.phases = (
    {"name": "main", "steps": 88},
    {"name": "flat", "steps": 8, "options": constant(3e-4)},
    {"name": "anneal", "options": annealing(3e-4)},
  )
  model = config.model
  model.d_model = 96
  model.num_layers = 3
  model.num_heads = 4
  model.num_kv_heads = 4
  model.head_dim = 24
  model.moe.num_experts = 16
  model.moe.d_expert = 40
