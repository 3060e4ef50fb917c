# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.config import LossConfig
from moejax.routing import RouterStats, top_k

T, D, V = 13, 8, 17
KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (T, D))
TABLE = jax.random.normal(KEYS[1], (V, D))
TARGETS = jax.random.randint(KEYS[2], (T,), 0, V)
MASK = jnp.arange(T) % 4 != 1


def plain(hidden, table, z_weight):
  """Cross entropy and z-loss with all logits at once."""
  logits = hidden @ table.T
  lse = jax.nn.logsumexp(logits, -1)
  xent = jnp.where(MASK, lse - logits[jnp.arange(T), TARGETS], 0).sum()
  z = jnp.where(MASK, lse**2, 0).sum()
  return xent + z_weight * z, (xent, z)


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_chunked_loss_equals_the_plain_one(chunk_size, z_weight):
  def chunked(hidden, table):
    sums = losses.next_token_sums(
      hidden, table, TARGETS, MASK, z_weight, chunk_size
    )
    return 2.5 * sums.total, sums

  (total, sums), grads = jax.jit(
    jax.value_and_grad(chunked, (0, 1), has_aux=True)
  )(HIDDEN, TABLE)
  (want, (xent, z)), want_grads = jax.value_and_grad(
    plain, (0, 1), has_aux=True
  )(HIDDEN, TABLE, z_weight)
  np.testing.assert_allclose(total, 2.5 * want, 1e-5)
  np.testing.assert_allclose(sums.xent, xent, 1e-5)
  np.testing.assert_allclose(sums.z, z, 1e-5)
  assert sums.tokens == MASK.sum()
  for got, expected in zip(grads, want_grads, strict=True):
    assert jnp.abs(got - 2.5 * expected).max() < 1e-5 * jnp.abs(expected).max()


def test_full_logits_never_exist():
  T, V, chunk = 4096, 3000, 128
  hidden = jax.ShapeDtypeStruct((T, 8), jnp.float32)
  table = jax.ShapeDtypeStruct((V, 8), jnp.float32)
  targets = jax.ShapeDtypeStruct((T,), jnp.int32)
  mask = jax.ShapeDtypeStruct((T,), bool)
  loss = lambda h, t, y, m: losses.next_token_sums(h, t, y, m, 0.1, chunk).total
  compiled = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(hidden, table, targets, mask)
    .compile()
  )
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < 8 * chunk * V * 4 < T * V * 4 / 3


def stats_of(logits_BTE, k=2):
  B, T, E = logits_BTE.shape
  mask = jnp.ones((B, T), bool)
  routing = top_k(logits_BTE.reshape(-1, E), mask.reshape(-1), k=k)
  return jax.tree.map(lambda x: x[None], RouterStats.of(routing, mask))


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_balance_is_one_when_perfect_and_e_when_collapsed(scope):
  E = 4
  even = jnp.tile(20.0 * jnp.eye(E), (2, 3, 1))  # each expert in turn
  assert losses.load_balance(stats_of(even, k=1), scope) == pytest.approx(1)
  one = jnp.zeros((2, 8, E)).at[..., 1].set(50.0)
  assert losses.load_balance(stats_of(one, k=1), scope) == pytest.approx(E)


def test_balance_against_a_plain_loop():
  logits = jax.random.normal(jax.random.key(3), (3, 5, 6)) * 2
  probs = np.asarray(jax.nn.softmax(logits, -1), np.float64)
  chosen = np.argsort(-probs, -1)[..., :2]
  per_row = []
  for b in range(3):
    share = np.bincount(chosen[b].ravel(), minlength=6) / 10
    per_row.append(6 * (share * probs[b].mean(0)).sum())
  share = np.bincount(chosen.ravel(), minlength=6) / 30
  over_all = 6 * (share * probs.mean((0, 1))).sum()
  stats = stats_of(logits)
  np.testing.assert_allclose(
    losses.load_balance(stats, "sequence"), np.mean(per_row), 1e-5
  )
  np.testing.assert_allclose(
    losses.load_balance(stats, "global"), over_all, 1e-5
  )


def test_balance_gradient_flows_through_probabilities_alone():
  logits = jax.random.normal(jax.random.key(4), (1, 6, 4))

  def by_stats(logits):
    return losses.load_balance(stats_of(logits), "global")

  share = losses.load_shares(stats_of(logits))[0]
  by_hand = lambda x: 4 * (share * jax.nn.softmax(x, -1).mean((0, 1))).sum()
  np.testing.assert_allclose(
    jax.grad(by_stats)(logits), jax.grad(by_hand)(logits), 1e-4, 1e-7
  )


def test_router_z_at_zero_logits():
  stats = stats_of(jnp.zeros((2, 3, 8)))
  assert losses.router_z(stats) == pytest.approx(np.log(8) ** 2, rel=1e-5)


def test_total_adds_weighted_terms():
  sums = losses.next_token_sums(HIDDEN, TABLE, TARGETS, MASK, 0.5, 4)
  stats = stats_of(jax.random.normal(jax.random.key(5), (2, 3, 8)))
  config = LossConfig(z_loss=0.5, load_balance=0.1, router_z=0.01)
  total, terms = losses.total_loss(config, sums, stats)
  want = (
    terms["loss/xent"] + 0.5 * terms["loss/z"]
    + 0.1 * terms["loss/balance"] + 0.01 * terms["loss/router_z"]
  )  # fmt: skip
  np.testing.assert_allclose(total, want, 1e-6)


def test_router_metrics_at_the_extremes():
  even = jnp.tile(20.0 * jnp.eye(4), (1, 2, 1))
  metrics = losses.router_metrics(stats_of(even, k=1))
  assert metrics["router/max_over_mean"] == pytest.approx(1)
  assert metrics["router/entropy"] < 0.01
  flat = losses.router_metrics(stats_of(jnp.zeros((1, 8, 4)), k=1))
  assert flat["router/entropy"] == pytest.approx(1)
  assert flat["router/max_over_mean"] == pytest.approx(4)  # ties: expert 0
  assert flat["router/dropped"] == 0


def test_a_batch_of_padding_has_a_finite_loss():
  sums = losses.next_token_sums(
    HIDDEN, TABLE, TARGETS, jnp.zeros(T, bool), 0.1, 4
  )
  total, _ = losses.total_loss(LossConfig(), sums, None)
  assert total == 0


def test_router_losses_as_a_sum_over_routers_are_l_times_their_mean():
  """JetMoE's form; what is logged stays the mean."""
  L, rows, E = 3, 2, 4
  draw = np.random.default_rng(0).uniform
  of = lambda *shape: jnp.asarray(draw(1, 2, shape), jnp.float32)
  stats = RouterStats(
    count_BE=of(L, rows, E), chosen_BE=of(L, rows, E),
    wanted_BE=of(L, rows, E),
    prob_BE=of(L, rows, E), z_B=of(L, rows),
    entropy_B=of(L, rows), dropped_B=of(L, rows), unrouted_B=of(L, rows),
    tokens_B=of(L, rows),
  )  # fmt: skip
  sums = losses.LossSums(*map(jnp.asarray, (8.0, 8.0, 0.0, 4.0)))

  def both(reduction):
    config = LossConfig(
      load_balance=0.3, router_z=0.2, router_reduction=reduction
    )
    return losses.total_loss(config, sums, stats)

  (mean, mean_terms), (total, sum_terms) = both("mean"), both("sum")
  np.testing.assert_allclose(total - 2.0, L * (mean - 2.0), rtol=1e-6)
  assert mean_terms["loss/balance"] == sum_terms["loss/balance"]
  assert mean_terms["loss/router_z"] == sum_terms["loss/router_z"]


def test_router_terms_against_plain_sums():
  """Values and gradients in float64, by finite differences of a loop."""
  L, B, T, E, k = 2, 3, 5, 4, 2
  draw = np.random.default_rng(3)
  logits = draw.standard_normal((L, B, T, E))
  mask = draw.random((B, T)) < 0.8

  def by_hand(logits):
    terms = {"sequence_balance": [], "mutual_information": [], "entropy": []}
    for layer in logits:
      prob = np.exp(layer)
      prob /= prob.sum(-1, keepdims=True)
      tokens = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
      mean = sum(prob[at] for at in tokens) / len(tokens)
      entropy = sum(-(prob[at] * np.log(prob[at])).sum() for at in tokens)
      terms["entropy"].append(entropy / len(tokens))
      terms["mutual_information"].append(
        (mean * np.log(mean)).sum() + entropy / len(tokens)
      )
      balance = 0.0
      for b in range(B):
        mine = [prob[at] for at in tokens if at[0] == b]
        share = np.zeros(E)
        for p in mine:
          share[np.argsort(-p)[:k]] += 1 / (k * len(mine))
        weight = len(mine) / len(tokens)
        balance += weight * E * (share * sum(mine) / len(mine)).sum()
      terms["sequence_balance"].append(balance)
    return {name: np.mean(values) for name, values in terms.items()}

  def ours(logits):
    layers = [
      RouterStats.of(
        top_k(x.reshape(B * T, E), jnp.asarray(mask).reshape(-1), k=k),
        jnp.asarray(mask),
      )
      for x in logits
    ]
    stats = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return {
      "sequence_balance": losses.load_balance(stats, "sequence"),
      "mutual_information": losses.mutual_information(stats),
      "entropy": losses.router_entropy(stats),
    }

  x = jnp.asarray(logits, jnp.float32)
  want, got = by_hand(logits), ours(x)
  step = 1e-5
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5)
    grad = np.asarray(jax.grad(lambda x, n=name: ours(x)[n])(x))
    for at in [(0, 0, 0, 1), (1, 2, 3, 0), (1, 1, 1, 2), (0, 2, 4, 3)]:
      up, down = logits.copy(), logits.copy()
      up[at] += step
      down[at] -= step
      slope = (by_hand(up)[name] - by_hand(down)[name]) / (2 * step)
      np.testing.assert_allclose(grad[at], slope, rtol=1e-3, atol=1e-6)


def test_router_terms_at_their_named_values():
  """As the docstrings say: balanced and sure, and no preference at all."""
  E, T = 4, 8
  sure = jnp.asarray(np.eye(E)[np.arange(T) % E] * 60, jnp.float32)
  for logits, information, entropy in (
    (sure, -np.log(E), 0.0), (jnp.zeros((T, E)), 0.0, np.log(E))
  ):  # fmt: skip
    mask = jnp.ones((1, T), bool)
    routing = top_k(logits, mask.reshape(-1), k=1)
    stats = jax.tree.map(lambda x: x[None], RouterStats.of(routing, mask))
    np.testing.assert_allclose(
      losses.mutual_information(stats), information, atol=1e-6
    )
    np.testing.assert_allclose(losses.router_entropy(stats), entropy, atol=1e-6)
    if entropy == 0:
      np.testing.assert_allclose(
        losses.load_balance(stats, "sequence"), 1, 1e-6
      )


def test_each_weight_counts_its_own_term():
  mask = jnp.ones((2, 4), bool)
  logits = jax.random.normal(jax.random.key(0), (8, 4))
  routing = top_k(logits, mask.reshape(-1), k=2)
  stats = jax.tree.map(lambda x: x[None], RouterStats.of(routing, mask))
  sums = losses.LossSums(*(jnp.ones(()) for _ in range(4)))
  none = {"load_balance": 0.0, "router_z": 0.0}
  base, terms = losses.total_loss(LossConfig(**none), sums, stats)
  assert "loss/router_entropy" not in terms
  for name, of in (
    ("sequence_balance", lambda: losses.load_balance(stats, "sequence")),
    ("mutual_information", lambda: losses.mutual_information(stats)),
    ("router_entropy", lambda: losses.router_entropy(stats)),
  ):
    config = LossConfig(**none, **{name: 0.5})
    loss, terms = losses.total_loss(config, sums, stats)
    np.testing.assert_allclose(terms[f"loss/{name}"], of(), rtol=1e-6)
    np.testing.assert_allclose(loss - base, 0.5 * of(), rtol=1e-4)


def test_sums_by_source_are_parts_of_the_sum():
  source_T = jnp.arange(T) % 3

  def sums_of(hidden, sources=None, count=0):
    return losses.next_token_sums(
      hidden, TABLE, TARGETS, MASK, 0.3, 4, sources, count
    )

  sums = sums_of(HIDDEN, source_T, 4)
  logits = HIDDEN @ TABLE.T
  xent_T = jax.nn.logsumexp(logits, -1) - logits[jnp.arange(T), TARGETS]
  for s in range(4):
    own_T = MASK & (source_T == s)
    np.testing.assert_allclose(
      sums.xent_U[s], jnp.where(own_T, xent_T, 0).sum(), 1e-5
    )
    assert sums.tokens_U[s] == own_T.sum()
  # And change nothing else.
  plain, apart = (
    jax.value_and_grad(lambda h, more=more: sums_of(h, *more).total)(HIDDEN)
    for more in ((), (source_T, 4))
  )
  jax.tree.map(np.testing.assert_array_equal, plain, apart)
