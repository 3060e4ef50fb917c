# SPDX-License-Identifier: Apache-2.0
"""Who goes where: one router a file, all with the same signature."""

from moejax.routing.base import (
  Routing,
  check_routing,
  home_of,
  is_causal,
  non_causal,
  resolve,
)
from moejax.routing.choices import Choices
from moejax.routing.group_limited import group_limited
from moejax.routing.recycle import recycle
from moejax.routing.stats import RouterStats
from moejax.routing.top_k import top_k

__all__ = [
  "Choices", "RouterStats", "Routing", "check_routing", "group_limited",
  "home_of", "is_causal", "non_causal", "recycle", "resolve", "top_k",
]  # fmt: skip
