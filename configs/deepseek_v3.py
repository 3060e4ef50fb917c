# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3: 671 B parameters, 38 B active (arXiv:2412.19437).

  moejax train --config=configs/deepseek_v3.py --workdir=runs/ds
  moejax train --config=configs/deepseek_v3.py:tiny --workdir=runs/ds_tiny

Published: 14.8 T tokens in rows of 4,096 on 2,048 H800, 2.66 M GPU hours. The
rates, decay and balancing are the paper's; its batch grows from 3,072 to 15,360
rows over the first 469 B tokens (here it is the latter), its last 500 B tokens
have rates of their own, and its second prediction head is left out here.
`:tiny` is a minute on a laptop.

Latent attention; three dense layers, then one shared expert and 256 routed
ones, eight out of four groups, by sigmoid scores and a bias that balances; RoPE
stretched by yarn, as the published weights were in the end.
"""

from moejax.config import default_config


def get_config(arg=""):
  config = default_config()

  model = config.model
  model.vocab_size = 129280
  model.d_model = 7168
  model.num_layers = 61
  model.prefix = ("mla/mlp",) * 3
  model.pattern = ("mla/moe",)
  model.num_heads = 128
  model.num_kv_heads = 128
  model.head_dim = 192
  model.mla.q_rank = 1536
  model.mla.kv_rank = 512
  model.mla.nope_dim = 128
  model.mla.rope_dim = 64
  model.mla.v_dim = 128
  model.d_mlp = 18432
  model.qk_norm = "none"
  model.norm_eps = 1e-6
  model.rope_theta = 10000.0
  model.rope_scaling = (
    "yarn(factor=40.0, original=4096, beta_fast=32.0, beta_slow=1.0, "
    "mscale=1.0, mscale_all_dim=1.0)"
  )
  model.init_std = 0.006
  model.moe.num_experts = 256
  model.moe.d_expert = 2048
  model.moe.num_shared_experts = 1
  model.moe.router = (
    "group_limited(k=8, num_groups=8, topk_groups=4, scale=2.5, "
    "bias_rate=0.001)"
  )
  model.remat = "full"

  config.loss.load_balance = 1e-4
  config.loss.load_balance_scope = "sequence"
  config.loss.router_z = 0.0

  config.optimizer.learning_rate = 2.2e-4
  config.optimizer.schedule.name = "wsd"
  config.optimizer.schedule.warmup = 2000.0
  config.optimizer.schedule.decay = 0.29  # 4.3 T of 14.8 T tokens
  config.optimizer.schedule.decay_shape = "cosine"
  config.optimizer.schedule.final = 0.1
  config.data.sources = ("data/deepseek/*.jsonl.gz",)
  config.data.tokenizer = "tokenizers/deepseek/tokenizer.json"
  config.data.seq_len = 4096
  config.train.batch_size = 15360
  config.train.num_steps = 235_000  # 14.8 T tokens
  config.checkpoint.every = 1000
  config.eval.every = 1000

  if arg == "tiny":
    _shrink(config)
  elif arg:
    raise ValueError(f"no variant {arg!r}; there is 'tiny'")
  return config


def _shrink(config):
  from tiny import shrink_training

  shrink_training(config)
  model = config.model
  model.d_model = 88
  model.num_layers = 5
  model.num_heads = 3
  model.num_kv_heads = 3
  model.head_dim = 32
  model.mla.q_rank = 40
  model.mla.kv_rank = 28
  model.mla.nope_dim = 20
  model.mla.rope_dim = 12
  model.mla.v_dim = 24
  model.d_mlp = 136
  model.moe.num_experts = 12
  model.moe.d_expert = 36
  model.moe.router = (
    "group_limited(k=3, num_groups=4, topk_groups=2, scale=2.5, "
    "bias_rate=0.001)"
  )
