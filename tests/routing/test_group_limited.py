# SPDX-License-Identifier: Apache-2.0
"""Groups of experts and the bias that balances, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.routing import RouterStats, group_limited, resolve
from moejax.routing.balance import bias_rate, has_bias, update_bias
from moejax.spec import Spec

T, E, K = 37, 12, 3


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(logits, bias, num_groups, topk_groups, scale, renormalize):
  """Chosen experts and weights of each token, float64."""
  experts, weights = [], []
  for row in np.asarray(logits, np.float64):
    score = 1 / (1 + np.exp(-row))
    choice = score + bias
    groups = choice.reshape(num_groups, -1)
    best = np.sort(groups, axis=1)[:, -2:].sum(1)
    kept = np.argsort(-best)[:topk_groups]
    allowed = np.repeat(np.isin(np.arange(num_groups), kept), E // num_groups)
    order = np.argsort(-np.where(allowed, choice, -np.inf))[:K]
    weight = score[order]
    if renormalize:
      weight = weight / weight.sum()
    experts.append(order)
    weights.append(scale * weight)
  return np.array(experts), np.array(weights)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_groups, topk_groups", [(4, 2), (3, 1), (1, 1)])
def test_choice_and_weights(num_groups, topk_groups, renormalize):
  logits, bias = draw(0, T, E), draw(1, E)  # biases below zero among them
  mask = np.arange(T) % 5 != 0
  routing = group_limited(
    jnp.asarray(logits), jnp.asarray(mask), k=K, num_groups=num_groups,
    topk_groups=topk_groups, scale=2.5, renormalize=renormalize,
    bias_E=jnp.asarray(bias),
  )  # fmt: skip
  experts, weights = by_hand(
    logits, bias, num_groups, topk_groups, 2.5, renormalize
  )
  experts[~mask], weights[~mask] = E, 0
  np.testing.assert_array_equal(routing.expert_A.reshape(T, K), experts)
  np.testing.assert_allclose(
    routing.weight_A.reshape(T, K), weights, rtol=2e-6, atol=1e-7
  )


def test_the_bias_moves_the_choice_and_has_no_gradient():
  logits = jnp.asarray(draw(0, T, E))
  mask = jnp.ones(T, bool)
  route = functools.partial(group_limited, k=K, num_groups=4, topk_groups=2)
  bias = jnp.zeros(E).at[7].set(5.0)
  routing = route(logits, mask, bias_E=bias)
  assert (routing.expert_A.reshape(T, K) == 7).any(1).all()
  total = lambda b, x: (route(x, mask, bias_E=b).weight_A ** 2).sum()
  d_bias, d_logits = jax.grad(total, argnums=(0, 1))(bias, logits)
  assert not d_bias.any()
  assert d_logits.any()


def test_balancing_uses_the_normalised_scores():
  logits = jnp.asarray(draw(0, T, E))
  routing = group_limited(logits, jnp.ones(T, bool), k=K)
  score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  prob = score / score.sum(1, keepdims=True)
  stats = RouterStats.of(routing, jnp.ones((1, T), bool))
  np.testing.assert_allclose(stats.prob_BE[0], prob.sum(0), rtol=1e-5)
  entropy = -(prob * np.log(prob)).sum()
  np.testing.assert_allclose(stats.entropy_B[0], entropy, rtol=1e-5)


def test_the_bias_rises_where_the_load_is_low():
  bias = jnp.array([[0.5, 0.0, -0.5, 0.0], [0.0] * 4])
  count = jnp.array([[8.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
  got = update_bias(bias, count, 0.25)
  np.testing.assert_allclose(got[0], [0.25, 0.25, -0.5, 0.0])
  np.testing.assert_allclose(got[1], 0)


def test_what_a_router_says_of_its_bias():
  router = resolve(Spec.parse("group_limited(k=3)"))
  assert has_bias(router) and bias_rate(router) == 0.001
  router = resolve(Spec.parse("group_limited(k=3, bias_rate=0.5)"))
  assert bias_rate(router) == 0.5
  router = resolve(Spec.parse("top_k(k=2)"))
  assert not has_bias(router) and bias_rate(router) == 0
  with pytest.raises(ConfigError, match="is given its bias_E by the model"):
    resolve(Spec.parse("group_limited(k=3, bias_E=1)"))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"k": 3, "num_groups": 5}, "12 experts do not make num_groups=5 equal"),
    ({"k": 3, "num_groups": 12}, "groups of two or more"),
    ({"k": 3, "num_groups": 0}, "do not make num_groups=0"),
    ({"k": 3, "num_groups": 4, "topk_groups": 5}, r"is not in \[1, 4\]"),
    ({"k": 4, "num_groups": 4}, "1 groups of 3 hold fewer than k=4"),
    ({"k": 1}, "gives the router no gradient"),
  ],
)
def test_impossible_sizes(options, message):
  with pytest.raises(ConfigError, match=message):
    group_limited(jnp.zeros((T, E)), jnp.ones(T, bool), **options)
