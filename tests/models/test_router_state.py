# SPDX-License-Identifier: Apache-2.0
"""Biases that balance: in which layer, how they change, that they are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli import load_config_file
from moejax.config import Config
from moejax.models import build, init_variables, unstack_repeats
from moejax.models.router_state import as_router_state
from moejax.step import batch_sums, init_state, make_train_step
from tests.test_published import CONFIGS

B, T = 4, 32


def config_with(accumulation=1, **model):
  values = load_config_file(f"{CONFIGS / 'deepseek_v3.py'}:tiny")
  values.model.prefix = ("mla/mlp", "mla/moe")
  values.model.num_layers = 4
  values.model.update(model)
  values.train.batch_size = B
  values.train.accumulation_steps = accumulation
  values.data.seq_len = T
  return Config.from_dict(values)


def batch_of(seed=0):
  row = np.random.default_rng(seed).integers(0, 256, (B, T + 1))
  segments = np.ones((B, T), np.int32)
  segments[0, 20:] = 0  # padding counts nowhere
  return jax.tree.map(jnp.asarray, {
    "tokens": row[:, :-1], "targets": row[:, 1:], "segment_ids": segments,
    "positions": np.tile(np.arange(T), (B, 1)), "loss_mask": segments > 0,
    "source_ids": np.zeros((B, T), np.int32),
  })  # fmt: skip


def in_order(config, tree):
  """[L, E]: biases by layer, from any layout."""
  variables = {"router_state": tree}
  if config.model.scan_layers:
    variables = unstack_repeats(config.model, variables)
  tree = variables["router_state"]
  paths = ["prefix_1", "repeats_0", "repeats_1"]
  blocks = [
    tree[p] if p.startswith("prefix") else tree[p]["block_0"] for p in paths
  ]
  return np.stack([block["moe"]["router_bias_E"] for block in blocks])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_each_layers_row_finds_its_layer(scan_layers):
  config = config_with(scan_layers=scan_layers)
  model = config.model
  variables = init_variables(build(model), jax.random.key(0))
  rows = jnp.arange(3 * 12.0).reshape(3, 12)
  tree = as_router_state(model, rows)
  state = variables["router_state"]
  assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, state)
  np.testing.assert_array_equal(in_order(config, tree), rows)


def test_attention_experts_have_biases_too():
  values = load_config_file(f"{CONFIGS / 'jetmoe_8b.py'}:tiny")
  values.model.num_layers = 2
  values.model.moe.router = "group_limited(k=2)"
  model = Config.from_dict(values).model
  variables = init_variables(build(model), jax.random.key(0))
  rows = jnp.arange(4 * 5.0).reshape(4, 5)
  tree = as_router_state(model, rows)
  assert jax.tree.structure(tree) == jax.tree.structure(
    variables["router_state"]
  )
  block = tree["repeats_1"]["block_0"]
  np.testing.assert_array_equal(block["attention"]["router_bias_E"], rows[2])
  np.testing.assert_array_equal(block["moe"]["router_bias_E"], rows[3])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_steps_move_the_biases_towards_even_loads(scan_layers, accumulation):
  """Against the rule in NumPy, from the counts of the whole batch."""
  config = config_with(accumulation, scan_layers=scan_layers)
  model = build(config.model)
  state = jax.jit(lambda: init_state(config, model))()
  step = jax.jit(make_train_step(config, model))
  sums = jax.jit(lambda s, b: batch_sums(config, model, s.variables, b, None))
  want = np.zeros((3, 12), np.float32)
  for seed in range(3):
    _, stats = sums(state, batch_of(seed))
    count = np.asarray(stats.count_BE.sum(1))
    assert count.sum() == 3 * 3 * (B * T - 12)
    want += 0.001 * np.sign(count.mean(1, keepdims=True) - count)
    state, metrics = step(state, batch_of(seed))
    got = in_order(config, state.router_state)
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert metrics["router/bias_max"] == pytest.approx(np.abs(want).max())
  assert len(np.unique(want.round(6))) > 3


def test_a_large_bias_is_what_the_choice_sees():
  config = config_with(scan_layers=True)
  model = build(config.model)
  variables = init_variables(model, jax.random.key(0))
  rows = jnp.zeros((3, 12)).at[1, 4].set(9.0)
  variables |= {"router_state": as_router_state(config.model, rows)}
  _, stats = batch_sums(config, model, variables, batch_of(), None)
  count = np.asarray(stats.count_BE.sum(1))
  assert count[1, 4] == B * T - 12
  assert count[0, 4] < B * T - 12 and count[2, 4] < B * T - 12


def test_without_a_bias_nothing_is_kept():
  config = config_with()
  moe = dataclasses.replace(config.model.moe, router="top_k(k=3)")
  model = build(dataclasses.replace(config.model, moe=moe))
  assert set(init_variables(model, jax.random.key(0))) == {"params"}
