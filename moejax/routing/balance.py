# SPDX-License-Identifier: Apache-2.0
"""Balancing by a bias: state of a router, outside of the gradient.

A router that takes `bias_E` gets one, [E] float32, for each of its layers, kept
in the collection `router_state`; one that also has the option `bias_rate` gets
it changed after each training step.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Router
from moejax.routing.inputs import BIAS, asks_for, option

Array = jax.Array

NAME = "router_bias_E"


def has_bias(router: Router) -> bool:
  """Whether the router takes a bias."""
  return asks_for(router, BIAS)


def bias_rate(router: Router) -> float:
  """What its bias changes by in a step; 0 if it has no such option."""
  return option(router, "bias_rate") if asks_for(router, "bias_rate") else 0.0


def check_rate(rate: float) -> None:
  """Refuses a rate that drives loads apart.

  Raises:
    ConfigError: below 0, or not finite.
  """
  if not 0 <= rate < math.inf:
    raise ConfigError(
      f"model.moe.router: bias_rate={rate} must be 0 or more: below 0 the bias "
      "would send ever more tokens to the busiest experts"
    )


def update_bias(bias_E: Array, count_E: Array, rate: float) -> Array:
  """Towards even loads (arXiv:2408.15664, equation 5).

  Args:
    bias_E: of any leading axes.
    count_E: assignments to each expert, over the whole batch.
    rate: of the change.
  """
  mean = count_E.mean(-1, keepdims=True)
  return bias_E + rate * jnp.sign(mean - count_E)


def update_state(state: Any, counts: Any, rate: float) -> Any:
  """`update_bias` for each layer of a `router_state`."""
  return jax.tree.map(lambda b, c: update_bias(b, c, rate), state, counts)
