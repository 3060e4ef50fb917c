# SPDX-License-Identifier: Apache-2.0
"""Recycle routing against loops in NumPy, with the same permutation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli import load_config_file
from moejax.config import Config
from moejax.errors import ConfigError
from moejax.losses import load_balance, router_metrics
from moejax.models import build
from moejax.routing import RouterStats, recycle
from moejax.step import batch_sums, init_state
from tests.models.test_router_state import batch_of
from tests.test_published import CONFIGS

E, S, GROUPS = 5, 24, 3
T = S * GROUPS


def draw(seed, skew=2.0):
  """Logits whose first experts are wanted most."""
  logits = np.random.default_rng(seed).standard_normal((T, E))
  return (logits + skew * np.linspace(1, -1, E)).astype(np.float32)


def keys_of(seed):
  return jax.random.split(jax.random.key(seed), T)


def place_by_hand(wanted, mask, key, capacity, recycled):
  """The reference's steps for one group: keep, list what is free, deal."""
  room = [capacity] * E
  expert, homeless = [], []
  for s, e in enumerate(wanted):
    expert.append(E)
    if not mask[s]:
      continue
    if room[e]:
      room[e] -= 1
      expert[s] = e
    else:
      homeless.append(s)
  if not recycled:
    return expert
  # Places of an expert are taken from the first on; chance orders the others.
  chance = np.asarray(jax.random.uniform(key, (E * capacity,)))
  free = [
    e * capacity + i
    for e in range(E)
    for i in range(capacity - room[e], capacity)
  ]
  pool = [place // capacity for place in sorted(free, key=lambda p: chance[p])]
  for s, e in zip(homeless, pool):
    expert[s] = e
  return expert


@pytest.mark.parametrize("overflow", ["recycle", "drop"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("padding", [0, 7])
def test_every_token_by_hand(factor, overflow, padding):
  logits, keys = draw(0), keys_of(1)
  mask = np.ones(T, bool)
  mask[S - padding : S] = False
  routing = recycle(
    jnp.asarray(logits), jnp.asarray(mask), group_size=S,
    capacity_factor=factor, overflow=overflow, rng=keys,
  )  # fmt: skip
  prob = np.exp(logits.astype(np.float64))
  prob /= prob.sum(1, keepdims=True)
  wanted = prob.argmax(1)
  capacity = math.ceil(factor * S / E)
  want = []
  for g in range(0, T, S):
    want += place_by_hand(
      wanted[g : g + S], mask[g : g + S], keys[g], capacity,
      overflow == "recycle",
    )  # fmt: skip
  np.testing.assert_array_equal(routing.expert_A, want)
  padded = np.pad(prob, [(0, 0), (0, 1)])
  np.testing.assert_allclose(
    routing.weight_A, padded[np.arange(T), want], rtol=1e-5, atol=1e-8
  )
  np.testing.assert_array_equal(routing.wanted_A, np.where(mask, wanted, E))
  loads = np.stack([
    np.bincount(x, minlength=E + 1)[:E] for x in np.reshape(want, (-1, S))
  ])  # fmt: skip
  assert loads.max() <= capacity
  nowhere = (np.array(want) == E) & mask
  if overflow == "recycle" and factor >= 1:
    assert not nowhere.any()
  else:
    assert nowhere.any()
    stats = jax.tree.map(
      lambda x: x[None], RouterStats.of(routing, jnp.asarray(mask)[None])
    )
    dropped = router_metrics(stats)["router/dropped"]
    assert dropped == pytest.approx(nowhere.sum() / mask.sum())


def test_evaluation_is_plain_top_1():
  """Who else is in the batch does not matter there."""
  logits = jnp.asarray(draw(0))
  whole = recycle(logits, jnp.ones(T, bool), group_size=S, rng=None)
  np.testing.assert_array_equal(whole.expert_A, logits.argmax(1))
  odd = recycle(logits[:7], jnp.ones(7, bool), group_size=S, rng=None)
  np.testing.assert_array_equal(odd.expert_A, whole.expert_A[:7])


def test_places_are_dealt_in_proportion_to_room():
  """All want expert 0; the others have room 6, 6, 6, 6 less what is masked."""
  logits = jnp.zeros((S, E)).at[:, 0].set(5.0).at[:3, 1].set(9.0)
  route = jax.jit(
    lambda keys: recycle(logits, jnp.ones(S, bool), group_size=S, rng=keys)
  )
  keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), S))(
    jnp.arange(2000)
  )
  experts = np.asarray(jax.vmap(lambda k: route(k).expert_A)(keys))
  capacity = math.ceil(S / E)
  assert (experts[:, :3] == 1).all()
  assert (experts[:, 3 : 3 + capacity] == 0).all()
  moved = experts[:, 3 + capacity :]
  room = np.array([0, capacity - 3] + [capacity] * (E - 2))
  for column in (0, -1):  # the first and the last that is dealt a place
    share = np.bincount(moved[:, column], minlength=E) / len(moved)
    np.testing.assert_allclose(share, room / room.sum(), atol=0.04)


def test_the_gradient_is_that_of_the_probability_it_ended_at():
  logits, keys = jnp.asarray(draw(0)), keys_of(1)
  mask = jnp.ones(T, bool)
  route = lambda x: recycle(x, mask, group_size=S, rng=keys)
  experts = route(logits).expert_A
  got = jax.grad(lambda x: (route(x).weight_A ** 2).sum())(logits)

  def by_hand(x):
    return (jax.nn.softmax(x)[jnp.arange(T), experts] ** 2).sum()

  np.testing.assert_allclose(got, jax.grad(by_hand)(logits), rtol=1e-5)


def test_balance_counts_what_was_wanted():
  logits, keys = jnp.asarray(draw(0)), keys_of(1)
  mask = jnp.ones((1, T), bool)
  routed = recycle(logits, mask[0], group_size=S, rng=keys)
  plain = recycle(logits, mask[0], group_size=S, rng=None)
  stats = [
    jax.tree.map(lambda x: x[None], RouterStats.of(r, mask))
    for r in (routed, plain)
  ]
  one, two = (load_balance(s, "global") for s in stats)
  assert one == pytest.approx(float(two), rel=1e-6) and one > 1.2
  assert router_metrics(stats[0])["router/max_over_mean"] < 1.06


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatches_deal_the_same_places(accumulation):
  values = load_config_file(f"{CONFIGS / 'hunyuan_large.py'}:tiny")
  values.model.num_layers = 2
  values.model.moe.router = "recycle(group_size=16)"  # half a row
  values.train.batch_size, values.data.seq_len, values.train.phases = 4, 32, ()
  sums = []
  for steps in (1, accumulation):
    values.train.accumulation_steps = steps
    config = Config.from_dict(values)
    model = build(config.model)
    state = init_state(config, model)
    key = jax.random.key(3)
    sums.append(batch_sums(config, model, state.variables, batch_of(), key))
  (loss, stats), (other, other_stats) = sums
  np.testing.assert_array_equal(stats.count_BE, other_stats.count_BE)
  assert other.xent == pytest.approx(float(loss.xent), rel=1e-6)
  assert stats.count_BE.sum(1).max() <= 4 * 2 * math.ceil(16 / 7)
  assert not stats.dropped_B.any()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"group_size": 7}, "72 tokens are not groups of group_size=7"),
    ({"group_size": 0}, "group_size=0 must be positive"),
    ({"group_size": S, "capacity_factor": 0}, "must be positive"),
    ({"group_size": S, "overflow": "pad"}, "'recycle' or 'drop'"),
  ],
)
def test_impossible_options(options, message):
  with pytest.raises(ConfigError, match=message):
    recycle(jnp.zeros((T, E)), jnp.ones(T, bool), rng=keys_of(0), **options)
