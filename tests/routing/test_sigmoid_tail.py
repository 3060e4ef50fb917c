# SPDX-License-Identifier: Apache-2.0
"""Sigmoid scores of tokens that all experts score low, in float64 NumPy.

At logits of -50 the square of the scores' sum is below float32, at -90 the
scores are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import group_limited, loss_free, top_k

T, E, K = 7, 6, 3
DRAW = np.random.default_rng(0)
LOGITS = DRAW.standard_normal((T, E)).astype(np.float32)
PULL = DRAW.standard_normal((T, E))
MASK = jnp.ones(T, bool)
LEVELS = pytest.mark.parametrize("level", [0, -50, -90])


def shares(x, epsilon=0.0, pull=None):
  """Of each row's sigmoids; the gradient of their sum times `pull`."""
  x = np.asarray(x, np.float64)
  score = 1 / (1 + np.exp(-x))
  share = score / (score.sum(1, keepdims=True) + epsilon)
  if pull is None:
    return share
  return share * (1 - score) * (pull - (pull * share).sum(1, keepdims=True))


@LEVELS
@pytest.mark.parametrize(
  "router, epsilon", [(top_k, 0), (group_limited, 1e-20)]
)
def test_renormalised_weights(router, epsilon, level):
  """DeepSeek's epsilon counts at -50, where the sum is smaller than it."""
  options = {"score": "sigmoid", "renormalize": True} if not epsilon else {}
  logits = jnp.asarray(LOGITS + level)
  route = lambda x: router(x, MASK, k=K, **options)
  expert_TX = np.asarray(route(logits).expert_A).reshape(T, K)
  chosen = np.take_along_axis(np.asarray(logits), expert_TX, axis=1)
  want = shares(chosen, epsilon)
  np.testing.assert_allclose(
    route(logits).weight_A.reshape(T, K), want, rtol=5e-6
  )
  total = lambda x: (route(x).weight_A * PULL[:, :K].reshape(-1)).sum()
  want = np.zeros((T, E))
  gradient = shares(chosen, epsilon, PULL[:, :K])
  np.put_along_axis(want, expert_TX, gradient, axis=1)
  np.testing.assert_allclose(
    jax.grad(total)(logits), want, rtol=1e-4, atol=1e-5 * np.abs(want).max()
  )


@LEVELS
@pytest.mark.parametrize("router", [loss_free, group_limited])
def test_shares_of_the_balancing_loss(router, level):
  logits = jnp.asarray(LOGITS + level)
  prob_TE = lambda x: router(x, MASK, k=K).prob_TE
  np.testing.assert_allclose(prob_TE(logits), shares(logits), rtol=5e-6)
  want = shares(logits, pull=PULL)
  np.testing.assert_allclose(
    jax.grad(lambda x: (prob_TE(x) * PULL).sum())(logits), want, rtol=1e-4,
    atol=1e-5 * np.abs(want).max(),
  )  # fmt: skip


@LEVELS
def test_the_best_are_chosen_where_scores_round_to_one_number(level):
  level = 30 if level == 0 else level  # near 1 scores do too
  logits = jnp.asarray(LOGITS + level)
  routing = top_k(logits, MASK, k=K, score="sigmoid")
  best = np.argsort(-np.asarray(logits), axis=1)[:, :K]
  np.testing.assert_array_equal(routing.expert_A.reshape(T, K), best)
