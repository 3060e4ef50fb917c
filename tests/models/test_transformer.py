# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models import (
  KVCache,
  Rows,
  build,
  count,
  init_variables,
  unstack_repeats,
)

SMALL = ModelConfig(
  vocab_size=61, d_model=32, num_layers=3, prefix=("attention/mlp",),
  num_heads=4, num_kv_heads=2, head_dim=8, d_mlp=48, dtype="float32",
  moe=MoEConfig(num_experts=5, d_expert=24, router="top_k(k=2)"),
  init_std=0.2,
)  # fmt: skip


def small(**changes):
  moe = {
    k: changes.pop(k) for k in list(changes) if hasattr(MoEConfig(), k)
  }  # fmt: skip
  moe = dataclasses.replace(SMALL.moe, **moe)
  return dataclasses.replace(SMALL, moe=moe, **changes)


@functools.cache
def variables_of(config):
  """Weights by what they depend on: drawing them takes seconds to compile."""
  return init_variables(build(config), jax.random.key(0))


def plain_rows(B, T):
  return Rows(
    jnp.ones((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T))
  )


def tokens_of(seed, B, T):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, SMALL.vocab_size, (B, T)), jnp.int32)


def logits_fn(model):
  def logits(variables, tokens, rows):
    out = model.apply(variables, tokens, rows)
    return model.apply(variables, out.hidden_BTD, method="logits")

  return jax.jit(logits)


def relative_error(got, want):
  got, want = np.asarray(got), np.asarray(want)
  return float(np.abs(got - want).max() / np.abs(want).max())


def assert_trees_near(got, want, tolerance):
  errors = jax.tree.map(relative_error, got, want)
  assert max(jax.tree.leaves(errors)) < tolerance, errors


@pytest.mark.parametrize(
  "config",
  [
    SMALL,
    small(tie_embeddings=True),
    small(num_shared_experts=2),
    small(qk_norm="head"),
    small(qk_norm="none", prefix=(), pattern=("attention/mlp",)),
    small(num_layers=5, pattern=("attention/moe", "attention/mlp")),
  ],
)
def test_counts_agree_with_the_tree(config):
  variables = jax.eval_shape(
    lambda: init_variables(build(config), jax.random.key(0))
  )
  sizes = sum(x.size for x in jax.tree.leaves(variables))
  assert count(config).num_params == sizes


def test_published_olmoe_counts():
  config = ModelConfig(vocab_size=50304)  # the defaults are OLMoE-1B-7B
  counts = count(config)
  assert counts.num_params == 6_919_161_856
  assert counts.num_active_params == 1_282_017_280
  variables = jax.eval_shape(
    lambda: init_variables(build(config), jax.random.key(0))
  )
  assert sum(x.size for x in jax.tree.leaves(variables)) == counts.num_params


def test_initial_weights_are_normal_cut_at_three_std():
  params = variables_of(SMALL)["params"]
  w = np.asarray(params["repeats"]["block_0"]["moe"]["w_up_EDF"])
  assert 0.95 * 0.2 < w.std() < 1.02 * 0.2
  assert 0.5 < np.abs(w).max() <= 0.6
  # Layers and experts are drawn apart.
  assert np.unique(w.round(7)).size > 0.99 * w.size
  assert (params["final_norm"]["scale"] == 1).all()


@pytest.mark.parametrize(
  "change",
  [
    {"remat": "full"}, {"remat": "dots"},
    {"remat": "exchange"}, {"remat": "experts"}, {"dispatch": "dense"},
    {"matmul": "reference"}, {"matmul": "cpu_loops"},
    {"attention": "blockwise"},
  ],
  ids=str,
)  # fmt: skip
def test_how_it_is_computed_does_not_change_the_result(change):
  model, other, variables = (
    build(SMALL),
    build(small(**change)),
    variables_of(SMALL),
  )
  tokens, rows = tokens_of(0, 2, 9), plain_rows(2, 9)
  weights = jax.random.normal(jax.random.key(1), (2, 9, SMALL.vocab_size))

  def loss(model):
    return jax.value_and_grad(
      lambda p: (logits_fn(model)(p, tokens, rows) * weights).sum()
    )

  value, grads = jax.jit(loss(model))(variables)
  other_value, other_grads = jax.jit(loss(other))(variables)
  assert relative_error(other_value, value) < 1e-5
  assert_trees_near(other_grads, grads, 2e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_apart_equal_scanned_ones(remat):
  scanned, variables = build(SMALL), variables_of(SMALL)
  apart = build(small(scan_layers=False, remat=remat))
  tokens, rows = tokens_of(0, 2, 9), plain_rows(2, 9)
  weights = jax.random.normal(jax.random.key(1), (2, 9, SMALL.vocab_size))

  def loss(model, variables):
    return (logits_fn(model)(variables, tokens, rows) * weights).sum()

  unstacked = unstack_repeats(scanned.config, variables)
  abstract = jax.eval_shape(lambda: init_variables(apart, jax.random.key(0)))
  assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(jnp.shape, abstract)
  grad = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
  want = unstack_repeats(scanned.config, grad(scanned, variables))
  assert_trees_near(grad(apart, unstacked), want, 2e-5)
  stats = jax.jit(lambda m, p: m.apply(p, tokens, rows).stats, static_argnums=0)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
    stats(apart, unstacked), stats(scanned, variables),
  )  # fmt: skip


def test_remat_covers_all_layers():
  variables, tokens, rows = (
    variables_of(SMALL),
    tokens_of(0, 2, 9),
    plain_rows(2, 9),
  )
  for remat, expected in (("none", 0), ("full", 2)):  # prefix, scanned pattern
    model = build(small(remat=remat))
    loss = lambda p, m=model: m.apply(p, tokens, rows).hidden_BTD.sum()
    text = str(jax.make_jaxpr(jax.grad(loss))(variables))
    assert text.count("remat2[") + text.count("checkpoint[") == expected


def test_later_tokens_do_not_reach_earlier_ones():
  model, variables = build(SMALL), variables_of(SMALL)
  tokens, rows = tokens_of(0, 1, 12), plain_rows(1, 12)
  before = logits_fn(model)(variables, tokens, rows)
  after = logits_fn(model)(variables, tokens.at[0, 7].add(1), rows)
  changed = jnp.abs(after - before).max(-1)[0] > 0
  assert not changed[:7].any()
  assert changed[7:].all()


def test_packed_documents_equal_lone_ones():
  model, variables = build(SMALL), variables_of(SMALL)
  first, second = tokens_of(1, 1, 5), tokens_of(2, 1, 7)
  padding = jnp.full((1, 4), 3, jnp.int32)
  packed = jnp.concatenate([first, second, padding], 1)
  rows = Rows(
    jnp.array([[1] * 5 + [2] * 7 + [0] * 4]),
    jnp.array([[*range(5), *range(7), *range(4)]]),
  )
  got = logits_fn(model)(variables, packed, rows)
  one = logits_fn(model)(variables, first, plain_rows(1, 5))
  two = logits_fn(model)(variables, second, plain_rows(1, 7))
  assert relative_error(got[:, :5], one) < 1e-5
  assert relative_error(got[:, 5:12], two) < 1e-5
  assert jnp.isfinite(got).all()


def test_padding_goes_nowhere_and_counts_nowhere():
  model, variables = build(SMALL), variables_of(SMALL)
  tokens = tokens_of(3, 2, 8)
  segments = jnp.array([[1] * 8, [1] * 3 + [0] * 5])
  rows = Rows(segments, jnp.broadcast_to(jnp.arange(8), (2, 8)))

  @jax.jit
  def stats_of(variables, tokens):
    return model.apply(variables, tokens, rows).stats

  stats = stats_of(variables, tokens)
  assert stats.count_BE.shape == (2, 2, 5)
  np.testing.assert_array_equal(stats.tokens_B, [[8, 3], [8, 3]])
  np.testing.assert_array_equal(stats.count_BE.sum(-1), [[16, 6], [16, 6]])
  np.testing.assert_allclose(stats.prob_BE.sum(-1), [[8, 3], [8, 3]], 1e-6)
  assert (stats.dropped_B == 0).all()
  grad = jax.jit(jax.grad(lambda p, t: stats_of(p, t).z_B[:, 1].sum()))
  grads = grad(variables, tokens)
  grads_changed = grad(variables, tokens.at[1, 3:].set(0))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-7),
    grads, grads_changed,
  )  # fmt: skip


@pytest.mark.parametrize(
  "dtype,tolerance,scan_layers",
  [("float32", 1e-5, True), ("float32", 1e-5, False), ("bfloat16", 0.03, True)],
)
def test_cached_logits_equal_uncached(dtype, tolerance, scan_layers):
  config = small(num_shared_experts=1)
  variables = variables_of(config)
  if not scan_layers:
    variables = unstack_repeats(config, variables)
  model = build(
    dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers)
  )
  tokens, rows = tokens_of(4, 2, 10), plain_rows(2, 10)
  want = logits_fn(model)(variables, tokens, rows)

  @jax.jit
  def append(cache, tokens, rows):
    out = model.apply(variables, tokens, rows, cache)
    logits = model.apply(variables, out.hidden_BTD, method="logits")
    return out.cache, logits

  cache = KVCache.empty(model.config, 2, 16)
  cut = lambda a, b: jax.tree.map(lambda x: x[:, a:b], (tokens, rows))
  got = []
  for start, end in [(0, 6), (6, 7), (7, 8), (8, 10)]:
    cache, logits = append(cache, *cut(start, end))
    got.append(logits)
  assert int(cache.length) == 10
  assert relative_error(jnp.concatenate(got, 1), want) < tolerance
