# SPDX-License-Identifier: Apache-2.0
"""Who goes where: one router a file, all with the same signature.

A name here that takes `logits_TE, mask_T` is a router that a config can name.
"""

from moejax.routing.attention_heads import attention_heads
from moejax.routing.base import (
  Routing,
  check_routing,
  is_causal,
  non_causal,
)
from moejax.routing.choices import Choices
from moejax.routing.expert_choice import expert_choice
from moejax.routing.forced_balance import forced_balance
from moejax.routing.group_limited import group_limited
from moejax.routing.hash_tokens import hash_tokens
from moejax.routing.inputs import projects
from moejax.routing.loss_free import loss_free
from moejax.routing.naming import home_of, resolve
from moejax.routing.noisy_top_k import noisy_top_k
from moejax.routing.null_experts import null_experts
from moejax.routing.random_choice import random_choice
from moejax.routing.recycle import recycle
from moejax.routing.sinkhorn import sinkhorn
from moejax.routing.stats import RouterStats
from moejax.routing.switch import switch
from moejax.routing.top_k import top_k
from moejax.routing.top_p import top_p

__all__ = [
  "Choices", "RouterStats", "Routing", "attention_heads", "check_routing",
  "expert_choice", "forced_balance", "group_limited", "hash_tokens", "home_of",
  "is_causal", "loss_free", "noisy_top_k", "non_causal", "null_experts",
  "projects", "random_choice", "recycle", "resolve", "sinkhorn", "switch",
  "top_k", "top_p",
]  # fmt: skip
