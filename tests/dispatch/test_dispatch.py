# SPDX-License-Identifier: Apache-2.0
"""Every dispatch against a loop over assignments in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import DISPATCHES, padded, ragged
from moejax.experts import GatedMlpWeights, gated_mlp
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.routing import Routing, recycle, switch, top_k

T, D, E, F, X = 12, 6, 5, 7, 2


@pytest.fixture(scope="module")
def weights():
  keys = jax.random.split(jax.random.key(0), 3)
  return GatedMlpWeights(
    jax.random.normal(keys[0], (E, D, F)),
    jax.random.normal(keys[1], (E, D, F)),
    jax.random.normal(keys[2], (E, F, D)),
  )


def expert_fn(h, sizes, weights, scale):
  matmul = functools.partial(grouped_matmul, backend="cpu")
  return gated_mlp(matmul, h, sizes, weights, scale)


def by_hand(weights, x, routing):
  """Weighted sum over the list of assignments, float64."""
  gate, up, down = (np.asarray(w, np.float64) for w in jax.tree.leaves(weights))
  x = np.asarray(x, np.float64)
  rows = []
  for t, e in zip(routing.token_A, routing.expert_A, strict=True):
    if e == E:
      rows.append(np.zeros(D))
      continue
    g = x[t] @ gate[e]
    rows.append(((g / (1 + np.exp(-g))) * (x[t] @ up[e])) @ down[e])
  y = np.zeros_like(x)
  weighted = np.stack(rows) * np.asarray(routing.weight_A)[:, None]
  np.add.at(y, np.asarray(routing.token_A), weighted)
  return y, np.stack(rows)


def token_choice(mask=None):
  logits = jax.random.normal(jax.random.key(1), (T, E)) * 2
  mask = jnp.ones(T, bool) if mask is None else mask
  return top_k(logits, mask, k=X)


def expert_choice():
  """Each expert takes its 3 best tokens: uneven per token, not token-major."""
  logits = jax.random.normal(jax.random.key(2), (T, E))
  weight, token = jax.lax.top_k(logits.T, 3)
  return Routing(
    token.reshape(-1), jnp.repeat(jnp.arange(E), 3), weight.reshape(-1), logits
  )


def with_capacity(router, **options):
  """Of the last group the later half is padding; some find no place."""
  logits = jax.random.normal(jax.random.key(5), (T, E)) * 2
  mask = jnp.arange(T) < T - 2
  keys = jax.random.split(jax.random.key(6), T)
  routing = router(logits, mask, group_size=6, rng=keys, **options)
  assert routing.capacity
  return routing


def all_to_one():
  logits = jnp.zeros((T, E)).at[:, 3].set(9.0)
  return Routing.from_token_choice(
    jnp.full((T, 1), 3), jnp.full((T, 1), 0.5), logits, jnp.ones(T, bool)
  )


ROUTINGS = {
  "token choice": token_choice,
  "padding": lambda: token_choice(jnp.arange(T) % 3 > 0),
  "nothing but padding": lambda: token_choice(jnp.zeros(T, bool)),
  "expert choice": expert_choice,
  "all to one": all_to_one,
  "top-1 with a capacity": lambda: with_capacity(switch, capacity_factor=1.0),
  "top-2 with a capacity": lambda: with_capacity(switch, k=2),
  "expert choice with its capacity": lambda: expert_choice().replace(
    capacity=3
  ),
  "recycled": lambda: with_capacity(recycle),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_values(weights, dispatch, routing):
  routing = ROUTINGS[routing]()
  x = jax.random.normal(jax.random.key(3), (T, D))
  run = jax.jit(
    functools.partial(DISPATCHES[dispatch], expert_fn),
    static_argnames="combine",
  )
  want, want_rows = by_hand(weights, x, routing)
  got = run(weights, x, routing)
  rows = run(weights, x, routing, combine=False)
  scale = max(np.abs(want).max(), 1e-9)
  assert np.abs(got - want).max() / scale < 1e-5
  assert np.abs(rows - want_rows).max() <= 1e-5 * max(
    np.abs(want_rows).max(), 1
  )


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dispatch", ["ragged", "padded"])
def test_gradients_equal_the_dense_ones(weights, dispatch, routing, combine):
  routing = ROUTINGS[routing]()
  x = jax.random.normal(jax.random.key(3), (T, D))
  rows = T if combine else routing.token_A.shape[0]
  pull = jax.random.normal(jax.random.key(4), (rows, D))

  def loss(dispatch, x, weights, weight_A):
    r = routing.replace(weight_A=weight_A)
    return (
      DISPATCHES[dispatch](expert_fn, weights, x, r, combine) * pull
    ).sum()

  grad = lambda name: jax.jit(
    jax.grad(functools.partial(loss, name), argnums=(0, 1, 2))
  )(x, weights, routing.weight_A)
  for got, want in zip(
    jax.tree.leaves(grad(dispatch)), jax.tree.leaves(grad("dense")), strict=True
  ):
    assert jnp.abs(got - want).max() <= 1e-5 * max(jnp.abs(want).max(), 1e-9)


def test_rows_that_go_nowhere_carry_no_nan(weights):
  routing = token_choice(jnp.arange(T) < 6)
  x = jax.random.normal(jax.random.key(3), (T, D)).at[6:].set(jnp.nan)
  y, grads = jax.value_and_grad(
    lambda w: ragged(expert_fn, w, x, routing)[:6].sum()
  )(weights)
  assert jnp.isfinite(y)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("routing", ["padding", "expert choice"])
def test_rows_beyond_the_groups_may_hold_anything(weights, routing, combine):
  """A TPU's kernel leaves them unwritten."""
  routing = ROUTINGS[routing]()
  x = jax.random.normal(jax.random.key(3), (T, D))

  def littered(h, sizes, weights, scale):
    y = expert_fn(h, sizes, weights, scale)
    return jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, jnp.nan)

  def results(expert_fn):
    loss = lambda w, x: jnp.sin(
      ragged(expert_fn, w, x, routing, combine)
    ).sum()  # fmt: skip
    return jax.value_and_grad(loss, argnums=(0, 1))(weights, x)

  for got, want in zip(
    jax.tree.leaves(results(littered)), jax.tree.leaves(results(expert_fn)),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(got, want)


def test_padded_computes_buffers_of_the_capacity():
  """One size for all experts, known when it is traced; without one, ragged."""
  routing = with_capacity(switch, capacity_factor=1.0)
  x = jax.random.normal(jax.random.key(3), (T, D))
  seen = []

  def spy(h, sizes, weights, scale):
    seen.append((h.shape, sizes))
    return h if scale is None else h * scale[:, None]

  y = padded(spy, None, x, routing)
  (shape, sizes), C = seen[0], routing.capacity
  assert C == 4 and shape == (E * C, D)  # ceil(6 / 5) places of two groups
  assert isinstance(sizes, np.ndarray) and (sizes == C).all()
  kept = np.asarray(routing.weight_A)[:, None] * np.asarray(x)
  np.testing.assert_allclose(y, kept, rtol=1e-6)
  padded(spy, None, x, routing.replace(capacity=0))
  assert seen[1][0] == (T, D) and not isinstance(seen[1][1], np.ndarray)
