# SPDX-License-Identifier: Apache-2.0
"""Shares of sigmoid scores, also where all scores of a token are tiny."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def sigmoid_shares(logits: Array, epsilon: float = 0.0) -> Array:
  """`sigmoid(logits) / (sum of them + epsilon)` over the last axis.

  By logarithms, as a softmax: below logits of about -43 the square of the sum,
  which the quotient's gradient divides by, is no float32, and below -87 neither
  are the scores. Epsilon is one more share, which nobody gets.

  Args:
    logits: float32.
    epsilon: what published code adds to the sum.
  """
  log_score = jax.nn.log_sigmoid(logits)
  if not epsilon:
    return jax.nn.softmax(log_score, axis=-1)
  rest = jnp.full_like(log_score[..., :1], math.log(epsilon))
  with_rest = jnp.concatenate([log_score, rest], axis=-1)
  return jax.nn.softmax(with_rest, axis=-1)[..., :-1]
