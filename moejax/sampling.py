# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: greedy, temperature, top-k, top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError

Array = jax.Array

# Below, any two float32 logits that differ are worlds apart, and the division
# would overflow.
_GREEDY = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a next token is drawn.

  Attributes:
    temperature: 0 (or below 1e-6) takes the likeliest token; else logits are
      divided by it.
    top_k: keep only the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens that together reach this probability
      (Holtzman et al. 2020); 1 keeps all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ConfigError(
        f"temperature={self.temperature} is not a number >= 0; 0 is greedy"
      )
    if self.top_k < 0:
      raise ConfigError(f"top_k={self.top_k} is negative; 0 keeps all tokens")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"top_p={self.top_p} is not in (0, 1]")


def next_tokens(sampling: Sampling, logits_BV: Array, keys_B: Array) -> Array:
  """One token per row, int32 [B]; each row draws from its own key."""
  if sampling.temperature < _GREEDY:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = _keep(sampling, logits_BV / sampling.temperature)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _keep(sampling: Sampling, logits_BV: Array) -> Array:
  """Logits with -inf for the tokens that top-k and top-p leave out."""
  V = logits_BV.shape[-1]
  if sampling.top_k and sampling.top_k < V:
    least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    prob_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays if those before it have not reached top_p yet.
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
    least_B1 = kept_BV.min(-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV
