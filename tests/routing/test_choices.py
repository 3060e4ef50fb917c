# SPDX-License-Identifier: Apache-2.0
"""Routers that decide token by token, against loops in NumPy (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.losses import load_balance, router_metrics
from moejax.routing import (
  RouterStats,
  attention_heads,
  forced_balance,
  group_limited,
  hash_tokens,
  loss_free,
  noisy_top_k,
  null_experts,
  random_choice,
  top_k,
  top_p,
)

T, E, K = 41, 6, 3
DRAW = np.random.default_rng(0)
LOGITS = DRAW.standard_normal((T, E)).astype(np.float32)
MASK = np.arange(T) % 7 != 3
KEYS = jax.random.split(jax.random.key(0), T)


def softmax(x):
  e = np.exp(np.asarray(x, np.float64))
  return e / e.sum()


def assert_table(routing, rows):
  """The routing is these (experts, weights) of each token, E for nowhere."""
  X = routing.experts_per_token
  assert X * T == routing.expert_A.shape[0]
  for t, (experts, weights) in enumerate(rows):
    at = slice(t * X, (t + 1) * X)
    if not MASK[t]:
      experts, weights = [E] * X, [0.0] * X
    np.testing.assert_array_equal(routing.token_A[at], t)
    np.testing.assert_array_equal(routing.expert_A[at], experts)
    np.testing.assert_allclose(routing.weight_A[at], weights, rtol=2e-5)


@pytest.mark.parametrize("training", [False, True])
def test_noisy_top_k(training):
  noise = DRAW.standard_normal((T, E)).astype(np.float32)
  keys = KEYS if training else None
  routing = noisy_top_k(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, noise_TE=jnp.asarray(noise),
    rng=keys,
  )  # fmt: skip
  rows = []
  for t in range(T):
    noisy = LOGITS[t].astype(np.float64)
    if training:
      normal = np.asarray(jax.random.normal(KEYS[t], (E,)))
      noisy = noisy + normal * np.log1p(np.exp(noise[t].astype(np.float64)))
    chosen = np.argsort(-noisy)[:K]
    rows.append((chosen, softmax(noisy[chosen])))
  assert_table(routing, rows)
  np.testing.assert_array_equal(routing.logits_TE, LOGITS)


def test_noise_is_learned_in_training_only():
  def spread(noise, keys):
    routing = noisy_top_k(
      jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, noise_TE=noise, rng=keys
    )
    return (routing.weight_A**2).sum()

  noise = jnp.zeros((T, E))
  assert jnp.abs(jax.grad(spread)(noise, KEYS)).max() > 1e-3
  assert jnp.abs(jax.grad(spread)(noise, None)).max() == 0


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_loss_free_chooses_by_bias_and_weighs_without(score):
  bias = np.linspace(-0.5, 0.5, E).astype(np.float32)
  routing = loss_free(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, score=score,
    bias_E=jnp.asarray(bias),
  )  # fmt: skip
  rows = []
  for t in range(T):
    row = LOGITS[t].astype(np.float64)
    scores = softmax(row) if score == "softmax" else 1 / (1 + np.exp(-row))
    chosen = np.argsort(-(scores + bias))[:K]
    rows.append((chosen, scores[chosen]))
  assert_table(routing, rows)
  weights = lambda bias: loss_free(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, score=score, bias_E=bias
  ).weight_A.sum()  # fmt: skip
  np.testing.assert_array_equal(jax.grad(weights)(jnp.asarray(bias)), 0)


def test_attention_heads_detach_the_sum():
  """Values of a renormalised top-k, gradients of the paper's formula."""
  pull = jnp.asarray(DRAW.standard_normal(T * K), jnp.float32)
  inputs = jnp.asarray(LOGITS), jnp.asarray(MASK)
  routing = attention_heads(*inputs, k=K)
  like = top_k(*inputs, k=K, renormalize=True)
  np.testing.assert_array_equal(routing.expert_A, like.expert_A)
  np.testing.assert_allclose(routing.weight_A, like.weight_A, rtol=1e-6)

  def total(router, **options):
    return jax.grad(
      lambda x: (router(x, inputs[1], k=K, **options).weight_A * pull).sum()
    )(inputs[0])

  got = np.asarray(total(attention_heads))
  for t in range(T):
    p = softmax(LOGITS[t])
    chosen = np.argsort(-p)[:K]
    d_p = np.zeros(E)
    if MASK[t]:
      d_p[chosen] = np.asarray(pull[t * K : (t + 1) * K]) / p[chosen].sum()
    want = p * (d_p - (p * d_p).sum())
    np.testing.assert_allclose(got[t], want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    total(attention_heads, detach=False),
    total(top_k, renormalize=True), rtol=1e-5, atol=1e-7,
  )  # fmt: skip
  assert np.abs(total(attention_heads, detach=False) - got).max() > 0.01


@pytest.mark.parametrize("p", [0.3, 0.6, 1.0])
def test_top_p_takes_as_few_as_it_needs(p):
  routing = top_p(jnp.asarray(LOGITS), jnp.asarray(MASK), p=p, k=4)
  rows = []
  for t in range(T):
    prob = softmax(LOGITS[t])
    experts, weights = [], []
    for e in np.argsort(-prob)[:4]:
      enough = sum(weights) >= p
      experts.append(E if enough else e)
      weights.append(0.0 if enough else prob[e])
    rows.append((experts, weights))
  assert_table(routing, rows)
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  metrics = router_metrics(jax.tree.map(lambda x: x[None], stats))
  used = np.mean([sum(w > 0 for w in r[1]) for r, m in zip(rows, MASK) if m])
  assert metrics["router/dropped"] == metrics["router/unrouted"] == 0
  np.testing.assert_allclose(metrics["router/experts_per_token"], used)


@pytest.mark.parametrize("router", [hash_tokens, random_choice])
def test_fixed_choices_are_those_of_the_id_alone(router):
  ids = jnp.asarray(DRAW.integers(0, 9, T), jnp.int32)
  position = (
    {"position_T": jnp.arange(T) % 5} if router is random_choice else {}
  )

  def table(at):
    given = {"token_T": ids, **position}
    routing = router(
      jnp.asarray(LOGITS[at]), jnp.ones(len(at), bool), k=K,
      **{name: x[at] for name, x in given.items()},
    )  # fmt: skip
    np.testing.assert_allclose(routing.weight_A, 1 / K)
    return np.asarray(routing.expert_A).reshape(-1, K)

  found = table(np.arange(T))
  assert all(len(set(row)) == K for row in found)
  # Neither logits nor neighbours matter: the same in any order.
  order = np.random.default_rng(1).permutation(T)
  np.testing.assert_array_equal(table(order), found[order])
  pairs = [
    (int(i), int(p)) for i, p in zip(ids, position.get("position_T", ids))
  ]
  seen = {}
  for pair, row in zip(pairs, found):
    np.testing.assert_array_equal(seen.setdefault(pair, row), row)
  assert len({tuple(row) for row in seen.values()}) > 5


def test_another_seed_is_another_table():
  ids = jnp.arange(50)
  table = lambda seed: (
    hash_tokens(
      jnp.zeros((50, E)), jnp.ones(50, bool), token_T=ids, seed=seed
    ).expert_A
  )
  assert (table(0) != table(1)).mean() > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_hashed_and_random_experts_are_even(seed):
  """Many ids: shares within five standard deviations of 1/E."""
  n = 6000
  given = jnp.zeros((n, E)), jnp.ones(n, bool)
  ids = jnp.arange(n)
  keys = jax.random.split(jax.random.key(seed), n)
  bound = 5 * np.sqrt(n / E * (1 - 1 / E))
  for routing in (
    hash_tokens(*given, token_T=ids, seed=seed),
    random_choice(*given, token_T=ids, position_T=ids, k=1),
    random_choice(*given, token_T=ids, position_T=ids, k=1, rng=keys),
  ):
    counts = np.bincount(routing.expert_A, minlength=E)
    assert np.abs(counts - n / E).max() < bound


def test_random_noise_follows_the_token():
  given = jnp.zeros((T, E)), jnp.ones(T, bool)
  ids = jnp.zeros(T, jnp.int32)
  whole = random_choice(*given, token_T=ids, position_T=ids, k=K, rng=KEYS)
  part = random_choice(
    given[0][9:], given[1][9:], token_T=ids[9:], position_T=ids[9:], k=K,
    rng=KEYS[9:],
  )  # fmt: skip
  np.testing.assert_array_equal(whole.expert_A[9 * K :], part.expert_A)


def test_forced_balance_is_balanced_whatever_the_logits():
  n = 4 * E
  routing = forced_balance(
    jnp.asarray(DRAW.standard_normal((n, E)) * 9, jnp.float32),
    jnp.ones(n, bool), k=K, position_T=jnp.arange(n),
  )  # fmt: skip
  np.testing.assert_array_equal(np.bincount(routing.expert_A), n * K // E)
  rows = np.asarray(routing.expert_A).reshape(n, K)
  assert all(len(set(row)) == K for row in rows)
  prob = jax.nn.softmax(routing.logits_TE, axis=-1)
  np.testing.assert_allclose(
    routing.weight_A, jnp.take_along_axis(prob, rows, axis=1).reshape(-1)
  )


N = 4  # null experts


def nulls():
  return DRAW.standard_normal((T, N)).astype(np.float32)


def test_null_experts_renormalise_over_the_true_ones():
  null = nulls()
  routing = null_experts(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, num_null=N,
    null_TN=jnp.asarray(null),
  )  # fmt: skip
  rows, none = [], 0
  for t in range(T):
    prob = softmax(np.concatenate([LOGITS[t], null[t]]))
    chosen = np.argsort(-prob)[:K]
    weights = np.where(chosen < E, prob[chosen], 0.0)
    none += MASK[t] and not weights.any()
    weights = weights / weights.sum() if weights.any() else weights
    rows.append((np.minimum(chosen, E), weights))
  assert_table(routing, rows)
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  metrics = router_metrics(jax.tree.map(lambda x: x[None], stats))
  assert metrics["router/dropped"] == 0
  np.testing.assert_allclose(metrics["router/unrouted"], none / MASK.sum())


def test_null_experts_share_the_softmax_in_all_sums():
  """Entropy and z are of all logits, not of the true experts' alone."""
  null = nulls()
  null[:, 0] = 30.0
  routing = null_experts(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, num_null=N,
    null_TN=jnp.asarray(null),
  )  # fmt: skip
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  rows = np.concatenate([LOGITS, null], axis=1)[MASK].astype(np.float64)
  lse = np.log(np.exp(rows).sum(1))
  np.testing.assert_allclose(stats.z_B[0], (lse**2).sum(), rtol=1e-5)
  assert 0 <= stats.entropy_B[0] < 1e-6
  np.testing.assert_allclose(
    stats.prob_BE[0], sum(map(softmax, rows)), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("router", ["loss_free", "group_limited"])
def test_the_loss_beside_a_bias_counts_by_scores_alone(router):
  """DeepSeek-V3, equations 17 to 20: neither bias nor groups are in f."""
  bias = jnp.asarray(np.linspace(0.6, -0.6, E), jnp.float32)
  given = jnp.asarray(LOGITS), jnp.asarray(MASK)
  if router == "loss_free":
    routing = loss_free(*given, k=2, bias_E=bias)
  else:
    routing = group_limited(
      *given, k=2, num_groups=3, topk_groups=1, bias_E=bias
    )
  stats = RouterStats.of(routing, given[1][None])
  got = load_balance(jax.tree.map(lambda x: x[None], stats), "sequence")
  score = 1 / (1 + np.exp(-LOGITS[MASK].astype(np.float64)))
  f, P = np.zeros(E), np.zeros(E)
  for row in score:
    f[np.argsort(-row)[:2]] += E / (2 * MASK.sum())
    P += row / row.sum() / MASK.sum()
  np.testing.assert_allclose(got, (f * P).sum(), rtol=1e-5)
  chosen = np.bincount(routing.expert_A, minlength=E + 1)[:E]
  np.testing.assert_array_equal(stats.count_BE[0], chosen)
  assert np.abs(chosen * E / (2 * MASK.sum()) - f).max() > 0.1


def test_the_balancing_loss_of_null_experts_is_adamoes():
  """Their mean load times each one's probability, all times E + N."""
  null = nulls()
  routing = null_experts(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, num_null=N,
    null_TN=jnp.asarray(null),
  )  # fmt: skip
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  got = load_balance(jax.tree.map(lambda x: x[None], stats), "global")
  count, mean = np.zeros(E + N), np.zeros(E + N)
  for t in np.flatnonzero(MASK):
    prob = softmax(np.concatenate([LOGITS[t], null[t]]))
    count[np.argsort(-prob)[:K]] += 1
    mean += prob / MASK.sum()
  count[E:] = count[E:].mean()
  want = (E + N) * (count / count.sum() * mean).sum()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_impossible_options():
  given = jnp.asarray(LOGITS), jnp.asarray(MASK)
  for message, call in (
    ("k=1 gives the router no", lambda: noisy_top_k(
      *given, k=1, noise_TE=given[0])),
    ("neither 'softmax' nor", lambda: loss_free(*given, k=1, score="tanh")),
    ("not in", lambda: top_p(*given, p=1.5, k=2)),
    (r"null_experts\(k=1\) renormalises", lambda: null_experts(
      *given, k=1, num_null=8, null_TN=given[0])),
    ("no gradient; use k >= 2", lambda: attention_heads(
      *given, k=1, detach=False)),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=message):
      call()
