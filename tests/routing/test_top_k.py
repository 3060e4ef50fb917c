# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.errors import ConfigError
from moejax.routing import RouterStats, is_causal, non_causal, resolve, top_k
from moejax.spec import Spec

T, E, K = 9, 6, 3
LOGITS = np.random.default_rng(0).standard_normal((T, E)).astype(np.float32)
MASK = np.arange(T) != 4


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_against_a_plain_loop(score, renormalize):
  routing = top_k(
    jnp.asarray(LOGITS), jnp.asarray(MASK), k=K, score=score,
    renormalize=renormalize,
  )  # fmt: skip
  for t in range(T):
    row = LOGITS[t].astype(np.float64)
    scores = (
      np.exp(row) / np.exp(row).sum() if score == "softmax"
      else 1 / (1 + np.exp(-row))
    )  # fmt: skip
    chosen = np.argsort(-scores)[:K]
    weight = scores[chosen]
    if renormalize:
      weight = weight / weight.sum()
    if not MASK[t]:
      chosen, weight = np.full(K, E), np.zeros(K)
    at = slice(t * K, (t + 1) * K)
    np.testing.assert_array_equal(routing.expert_A[at], chosen)
    np.testing.assert_allclose(routing.weight_A[at], weight, 1e-5)
    np.testing.assert_array_equal(routing.token_A[at], t)


def test_renormalised_top_1_is_refused():
  with pytest.raises(ValueError, match="no gradient; use k >= 2"):
    top_k(jnp.asarray(LOGITS), jnp.asarray(MASK), k=1, renormalize=True)


def test_unknown_score_is_refused():
  with pytest.raises(ValueError, match="softmax.*sigmoid"):
    top_k(jnp.asarray(LOGITS), jnp.asarray(MASK), k=1, score="softmin")


def test_jitter_follows_the_token_and_only_in_training():
  keys = jax.random.split(jax.random.key(0), T)
  logits, mask = jnp.asarray(LOGITS), jnp.ones(T, bool)
  quiet = top_k(logits, mask, k=K, jitter=0.5)
  noisy = top_k(logits, mask, k=K, jitter=0.5, rng=keys)
  plain = top_k(logits, mask, k=K)
  np.testing.assert_array_equal(quiet.weight_A, plain.weight_A)
  assert (noisy.weight_A != plain.weight_A).any()
  # A split of the batch draws the same noise for the same tokens.
  half = top_k(logits[4:], mask[4:], k=K, jitter=0.5, rng=keys[4:])
  np.testing.assert_array_equal(half.weight_A, noisy.weight_A[4 * K :])
  np.testing.assert_array_equal(noisy.logits_TE, logits)


@pytest.mark.parametrize("jitter", [0.01, 0.5])
def test_jitter_is_uniform_around_one(jitter):
  """Bounds, mean and spread of the factor, told from sigmoid scores."""
  n = 2000
  keys = jax.random.split(jax.random.key(1), n)
  routing = top_k(
    jnp.ones((n, E)), jnp.ones(n, bool), k=E, score="sigmoid", jitter=jitter,
    rng=keys,
  )  # fmt: skip
  score = np.asarray(routing.weight_A, np.float64)
  noise = (np.log(score / (1 - score)) - 1) / jitter  # uniform in [-1, 1]
  rounding = 1e-6 / jitter
  assert -1 - rounding <= noise.min() < -0.99
  assert 0.99 < noise.max() <= 1 + rounding
  # Within five standard deviations of mean and mean square.
  assert abs(noise.mean()) < 5 * np.sqrt(1 / 3 / noise.size)
  assert abs((noise**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / noise.size)


def test_stats_against_a_plain_count():
  mask_BT = jnp.asarray(np.arange(8).reshape(2, 4) != 6)
  logits = jnp.asarray(LOGITS[:8])
  routing = top_k(logits, mask_BT.reshape(-1), k=2)
  stats = RouterStats.of(routing, mask_BT)
  for b in range(2):
    counts, probs, z, entropy = np.zeros(E), np.zeros(E), 0.0, 0.0
    for t in range(4):
      if not mask_BT[b, t]:
        continue
      row = LOGITS[4 * b + t].astype(np.float64)
      p = np.exp(row) / np.exp(row).sum()
      counts[np.argsort(-p)[:2]] += 1
      probs += p
      z += np.log(np.exp(row).sum()) ** 2
      entropy -= (p * np.log(p)).sum()
    np.testing.assert_array_equal(stats.count_BE[b], counts)
    np.testing.assert_allclose(stats.prob_BE[b], probs, 1e-5)
    np.testing.assert_allclose(stats.z_B[b], z, 1e-5)
    np.testing.assert_allclose(stats.entropy_B[b], entropy, 1e-5)
  np.testing.assert_array_equal(stats.tokens_B, [4, 3])
  np.testing.assert_array_equal(stats.dropped_B, [0, 0])


def test_stats_see_dropped_assignments():
  mask_BT = jnp.ones((1, 4), bool)
  routing = top_k(jnp.asarray(LOGITS[:4]), mask_BT.reshape(-1), k=2)
  dropped = routing.replace(expert_A=routing.expert_A.at[3].set(E))
  assert RouterStats.of(dropped, mask_BT).dropped_B[0] == 1


def test_a_router_in_a_file_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / "router_of_ones_own.py").write_text(
    "from moejax.routing import top_k\n"
    "def mine(logits_TE, mask_T, *, k, rng=None):\n"
    "  return top_k(-logits_TE, mask_T, k=k)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  router = resolve(Spec.parse("router_of_ones_own.mine(k=1)"))
  routing = router(jnp.asarray(LOGITS), jnp.ones(T, bool), rng=None)
  np.testing.assert_array_equal(routing.expert_A, LOGITS.argmin(-1))


@pytest.mark.parametrize(
  "text,message",
  [
    ("topk(k=1)", "'topk'; did you mean 'top_k'. It has attention_heads"),
    ("top_k(n=1)", "its options: k, score, renormalize, jitter"),
    ("nowhere.at_all(k=1)", "no module 'nowhere'"),
    ("Routing(k=2)", "no router 'Routing'; it has attention_heads"),
    ("resolve(k=2)", "no router 'resolve'; it has attention_heads"),
  ],
)
def test_bad_routers_say_what_there_is(text, message):
  with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
    resolve(Spec.parse(text))


@pytest.mark.parametrize(
  "text, message",
  [
    ("top_k(k=2, k=3)", r"'top_k\(k=2, k=3\)' has k twice; leave one out"),
    ("switch(capacity_factor=1e400)", "capacity_factor is beyond any float"),
    ("top_p(p=-1e400, k=2)", "p is beyond any float; give a finite number"),
  ],
)
def test_arguments_that_cannot_be_parsed(text, message):
  with pytest.raises(ConfigError, match=message):
    assert MoEConfig(num_experts=E, router=text).router_spec


def test_causality_is_a_mark():
  @non_causal
  def looks_ahead(logits_TE, mask_T, *, rng=None):
    raise AssertionError

  assert not is_causal(looks_ahead)
  assert is_causal(resolve(Spec.parse("top_k(k=1)")))
