# SPDX-License-Identifier: Apache-2.0
"""Routers whose tokens compete in groups, against loops in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.routing import (
  RouterStats,
  expert_choice,
  is_causal,
  recycle,
  sinkhorn,
  switch,
)
from moejax.routing.capacity import limit, places_of_group
from moejax.routing.sinkhorn import balanced_plan

E, S, GROUPS = 4, 16, 3
T = S * GROUPS


def draw(seed, skew=1.5):
  logits = np.random.default_rng(seed).standard_normal((T, E))
  return (logits + skew * np.linspace(1, -1, E)).astype(np.float32)


def softmax(x):
  e = np.exp(np.asarray(x, np.float64))
  return e / e.sum(-1, keepdims=True)


MASK = np.arange(T) % 11 != 5
KEYS = jax.random.split(jax.random.key(0), T)


@pytest.mark.parametrize(
  "factor, group, k, experts, places",
  [
    (1.1, 100, 1, 10, 11),  # a float's 1.1 is a little more
    (1.25, 16, 1, 4, 5),
    (1.0, 10, 1, 4, 3),
    (0.5, 16, 2, 4, 4),
    (2.0, 8, 2, 2, 8),  # no more than there are tokens
  ],
)
def test_places(factor, group, k, experts, places):
  assert places_of_group(factor, group, k, experts) == places


def test_several_choices_cannot_be_recycled():
  wanted = jnp.zeros((S, 2), jnp.int32)
  with pytest.raises(ConfigError, match="2 choices of a token cannot be"):
    limit(
      wanted, jnp.ones(S, bool), E, group_size=S, places=3,
      recycle_rng=KEYS[:S],
    )  # fmt: skip


@pytest.mark.parametrize(
  "k, factor, renormalize",
  [
    (1, 1.0, False), (1, 1.25, False), (2, 1.0, False), (2, 1.0, True),
    (3, 0.5, False), (3, 0.5, True),
  ],
)  # fmt: skip
def test_switch_by_hand(k, factor, renormalize):
  logits = draw(0)
  routing = switch(
    jnp.asarray(logits), jnp.asarray(MASK), group_size=S, k=k,
    capacity_factor=factor, renormalize=renormalize, rng=KEYS,
  )  # fmt: skip
  prob = softmax(logits)
  order = np.argsort(-prob, axis=1)[:, :k]
  places = math.ceil(factor * S * k / E)
  want = np.full((T, k), E)
  for g in range(GROUPS):
    room = [places] * E
    for choice in range(k):  # all first choices come first
      for t in range(g * S, (g + 1) * S):
        e = order[t, choice]
        if MASK[t] and room[e]:
          room[e] -= 1
          want[t, choice] = e
  np.testing.assert_array_equal(routing.expert_A.reshape(T, k), want)
  weight = np.take_along_axis(prob, order, axis=1)
  if renormalize:
    weight /= weight.sum(1, keepdims=True)
  np.testing.assert_allclose(
    routing.weight_A.reshape(T, k), np.where(want < E, weight, 0.0), rtol=2e-5
  )
  wanted = np.where(MASK[:, None], order, E)
  np.testing.assert_array_equal(routing.wanted_A.reshape(T, k), wanted)
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  assert stats.dropped_B[0] == ((want == E) & MASK[:, None]).sum() > 0
  assert stats.unrouted_B[0] == ((want == E).all(1) & MASK).sum()
  assert np.bincount(want[want < E]).max() <= routing.capacity


def test_evaluation_knows_no_capacity():
  logits, mask = jnp.asarray(draw(0)), jnp.asarray(MASK)
  for router in (switch, recycle):
    routing = router(logits, mask, group_size=S, capacity_factor=0.5)
    want = np.where(MASK, np.argmax(draw(0), axis=1), E)
    np.testing.assert_array_equal(routing.expert_A, want)
    assert routing.capacity == 0


@pytest.mark.parametrize("k", [1, 2])
def test_expert_choice_by_hand(k):
  logits = draw(1)
  routing = expert_choice(
    jnp.asarray(logits), jnp.asarray(MASK), k=k, group_size=S
  )
  prob = softmax(logits)
  want = []
  for g in range(GROUPS):
    tokens = np.arange(g * S, (g + 1) * S)
    for e in range(E):
      value = np.where(MASK[tokens], prob[tokens, e], -1)
      for t in tokens[np.argsort(-value, kind="stable")[: S * k // E]]:
        want.append((t, e, prob[t, e]) if MASK[t] else (t, E, 0.0))
  got = zip(routing.token_A, routing.expert_A, routing.weight_A, strict=True)
  for (t, e, w), (t_want, e_want, w_want) in zip(got, want, strict=True):
    assert (t, e) == (t_want, e_want)
    np.testing.assert_allclose(w, w_want, rtol=2e-5)
  assert not is_causal(expert_choice)
  stats = RouterStats.of(routing, jnp.asarray(MASK)[None])
  seen = {t for t, e, _ in want if e < E}
  assert stats.unrouted_B[0] == MASK.sum() - len(seen)
  assert k > 1 or len(seen) < MASK.sum()
  assert routing.capacity == GROUPS * S * k // E


def test_expert_choice_of_all_tokens_is_dense():
  """k = E: each expert takes each token."""
  routing = expert_choice(
    jnp.asarray(draw(2)), jnp.ones(T, bool), k=E, group_size=S
  )
  pairs = set(zip(routing.token_A.tolist(), routing.expert_A.tolist()))
  assert pairs == {(t, e) for t in range(T) for e in range(E)}


def test_the_plan_is_sinkhorns():
  """Matrix scaling in plain float64, converged."""
  logits = draw(3)[:S]
  mask = MASK[:S]
  plan = np.exp(logits.astype(np.float64)) * mask[:, None]
  for _ in range(500):
    plan[mask] /= plan[mask].sum(1, keepdims=True) * mask.sum()
    plan /= plan.sum(0, keepdims=True) * E
  got = balanced_plan(jnp.asarray(logits), jnp.asarray(mask), 200)
  np.testing.assert_allclose(np.exp(got), plan, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_is_nearer_to_balance_and_greedy_in_evaluation(k):
  logits, mask = jnp.asarray(draw(4)), jnp.asarray(MASK)
  trained = sinkhorn(logits, mask, k=k, group_size=T, rng=KEYS)
  greedy = sinkhorn(logits, mask, k=k, group_size=T)
  best = np.argsort(-draw(4), axis=1)[:, :k]
  np.testing.assert_array_equal(greedy.expert_A.reshape(T, k)[MASK], best[MASK])
  counts = lambda routing: np.bincount(routing.expert_A, minlength=E + 1)[:E]
  fair = MASK.sum() * k / E
  assert counts(trained).max() < 1.25 * fair < 1.4 * fair < counts(greedy).max()
  chosen = np.asarray(trained.expert_A.reshape(T, k))[MASK]
  prob = softmax(draw(4))[MASK]
  np.testing.assert_allclose(
    np.asarray(trained.weight_A).reshape(T, k)[MASK],
    np.take_along_axis(prob, chosen, axis=1), rtol=2e-5,
  )  # fmt: skip


def plan_by_hand(logits, mask, iterations):
  """Rows, then columns, so many times, and rows at the end; float64."""
  plan = np.exp(logits.astype(np.float64))[mask]
  for _ in range(iterations):
    plan /= plan.sum(1, keepdims=True) * len(plan)
    plan /= plan.sum(0, keepdims=True) * E
  return plan / plan.sum(1, keepdims=True)


def test_sinkhorn_has_sixteen_iterations_by_default():
  """Logits so far apart that one more or one less choose otherwise."""
  logits = 8 * draw(0)
  routing = sinkhorn(
    jnp.asarray(logits), jnp.asarray(MASK), k=2, group_size=T, rng=KEYS
  )
  best = lambda n: np.argsort(-plan_by_hand(logits, MASK, n), axis=1)[:, :2]
  got = np.asarray(routing.expert_A).reshape(T, 2)[MASK]
  np.testing.assert_array_equal(got, best(16))
  for other in (3, 15, 17, 32):
    assert (best(other) != best(16)).any()


def test_padding_does_not_move_the_plan():
  logits = draw(5)[:S]
  mask = np.arange(S) < 10
  other = np.where(mask[:, None], logits, 7.0)
  of = lambda x: balanced_plan(jnp.asarray(x), jnp.asarray(mask), 16)[:10]
  np.testing.assert_array_equal(of(logits), of(other))
  nothing = balanced_plan(jnp.asarray(logits), jnp.zeros(S, bool), 16)
  assert jnp.isfinite(nothing).all()


@pytest.mark.parametrize("router", [expert_choice, sinkhorn, switch])
def test_groups_do_not_see_each_other(router):
  """A split of the batch between groups changes nothing."""
  logits, mask = jnp.asarray(draw(6)), jnp.asarray(MASK)
  whole = router(logits, mask, k=2, group_size=S, rng=KEYS)
  part = router(logits[S:], mask[S:], k=2, group_size=S, rng=KEYS[S:])
  first = whole.expert_A.shape[0] // GROUPS
  np.testing.assert_array_equal(whole.expert_A[first:], part.expert_A)
  np.testing.assert_array_equal(whole.token_A[first:] - S, part.token_A)
  np.testing.assert_allclose(whole.weight_A[first:], part.weight_A, rtol=1e-6)


def test_impossible_options():
  given = jnp.asarray(draw(0)), jnp.asarray(MASK)
  for message, call in (
    ("48 tokens are not groups of group_size=7", lambda: switch(
      *given, group_size=7, rng=KEYS)),
    ("48 tokens are not groups", lambda: sinkhorn(
      *given, k=1, group_size=32, rng=KEYS)),
    ("must be positive", lambda: switch(
      *given, group_size=S, capacity_factor=0.0, rng=KEYS)),
    ("capacity_factor=inf and group_size=16 must be", lambda: switch(
      *given, group_size=S, capacity_factor=math.inf, rng=KEYS)),
    ("group_size=6 times k=1 over 4 experts", lambda: expert_choice(
      *given, k=1, group_size=6)),
    ("in .1, group_size.", lambda: expert_choice(*given, k=5, group_size=S)),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=message):
      call()
