# SPDX-License-Identifier: Apache-2.0
"""Which router: all that moejax has, in one small model."""

from moejax.sweep import Sweep


def get_sweep():
  """`configs/tiny.py`: 8 experts, 2 a token where the router lets us say."""
  routers = {
    "top_k": "top_k(k=2)",
    "top_k_renormalised": "top_k(k=2, renormalize=True)",
    "top_k_sigmoid": "top_k(k=2, score='sigmoid')",
    "top_1": "top_k(k=1)",
    "switch": "switch(group_size=256)",
    "noisy_top_k": "noisy_top_k(k=2)",
    "expert_choice": "expert_choice(k=2, group_size=256)",
    "loss_free": "loss_free(k=2, bias_rate=0.01)",
    "group_limited": "group_limited(k=2, num_groups=4, topk_groups=2, "
    "bias_rate=0.01)",
    "hash_tokens": "hash_tokens(k=2)",
    "random_choice": "random_choice(k=2)",
    "sinkhorn": "sinkhorn(k=2, group_size=256)",
    "top_p": "top_p(p=0.4, k=4)",
    "null_experts": "null_experts(k=4, num_null=8)",
    "recycle": "recycle(group_size=256)",
    "attention_heads": "attention_heads(k=2)",
    "forced_balance": "forced_balance(k=2)",
  }
  points = {name: {"model.moe.router": r} for name, r in routers.items()}
  # What is balanced otherwise, or learns nothing, no loss shall balance too.
  for name in (
    "loss_free", "group_limited", "hash_tokens", "random_choice", "sinkhorn",
    "expert_choice", "forced_balance",
  ):  # fmt: skip
    points[name]["loss.load_balance"] = 0.0
  points["loss_free"]["loss.sequence_balance"] = 0.0001
  points["group_limited"]["loss.sequence_balance"] = 0.0001
  for name in ("hash_tokens", "random_choice", "forced_balance"):
    points[name]["loss.router_z"] = 0.0
  points["top_p"]["loss.router_entropy"] = 0.0001
  return Sweep(
    config="../../configs/tiny.py",
    points=points,
    common={
      "train.num_steps": 120,
      "eval.sample_tokens": 0,
      "train.batch_size": 4,
    },
    baseline="top_k",
  )
