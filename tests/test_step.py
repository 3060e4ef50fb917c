# SPDX-License-Identifier: Apache-2.0
"""The step does not depend on how it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.config import Config
from moejax.models import build
from moejax.step import batch_sums, init_state, make_train_step

BASE = {
  "model": {
    "vocab_size": 40, "d_model": 24, "num_layers": 2, "num_heads": 3,
    "num_kv_heads": 3, "head_dim": 8, "dtype": "float32", "init_std": 0.3,
    "moe": {"num_experts": 4, "d_expert": 16, "router": "top_k(k=2)"},
  },
  "loss": {
    "load_balance": 0.5, "router_z": 0.1, "z_loss": 0.01, "chunk_size": 8
  },
  "train": {"batch_size": 4, "num_steps": 10_000},
}  # fmt: skip


def make(**changes):
  """BASE with dotted changes."""
  import copy

  values = copy.deepcopy(BASE)
  for path, value in changes.items():
    *parents, name = path.split("__")
    functools.reduce(lambda d, p: d.setdefault(p, {}), parents, values)[
      name
    ] = value
  return Config.from_dict(values)


def make_batch():
  rng = np.random.default_rng(0)
  segments = np.ones((4, 12), np.int32)
  segments[1, 5:], segments[3, 2:] = 2, 0  # uneven rows: means must not care
  return {
    "tokens": jnp.asarray(rng.integers(0, 40, (4, 12)), jnp.int32),
    "targets": jnp.asarray(rng.integers(0, 40, (4, 12)), jnp.int32),
    "segment_ids": jnp.asarray(segments),
    "positions": jnp.asarray(np.tile(np.arange(12), (4, 1)), jnp.int32),
    "loss_mask": jnp.asarray(segments > 0),
  }


TERMS = ("loss/total", "loss/balance", "loss/router_z")


@functools.cache
def base_state():
  """A state for all: no change here changes its shapes."""
  config = make()
  return jax.jit(lambda: init_state(config, build(config.model)))()


@functools.cache
def gradients(config):
  """Values of TERMS and the gradient of each alone."""
  model = build(config.model)

  def terms(variables):
    sums, stats = batch_sums(
      config, model, variables, make_batch(), jax.random.key(7)
    )
    _, terms = losses.total_loss(config.loss, sums, stats)
    return jnp.stack([terms[name] for name in TERMS])

  @jax.jit
  def values_and_gradients(variables):
    values, pull = jax.vjp(terms, variables)
    return values, [pull(row)[0] for row in jnp.eye(len(TERMS))]

  return values_and_gradients(base_state().variables)


HOW = [
  {"train__accumulation_steps": 2},
  {"train__accumulation_steps": 4, "model__remat": "full"},
  {"model__moe__dispatch": "dense"},
  {"model__moe__matmul": "reference"},
  {"loss__chunk_size": 48},
]


NOISY_GLOBAL = {"model__moe__router": "top_k(k=2, jitter=0.3)"}
BY_SEQUENCE = {"loss__load_balance_scope": "sequence"}


@pytest.mark.parametrize(
  "how,setting",
  [(how, NOISY_GLOBAL) for how in HOW] + [(HOW[0], BY_SEQUENCE)],
  ids=str,
)
def test_loss_and_gradients_are_the_same(how, setting):
  want, want_grads = gradients(make(**setting))
  got, grads = gradients(make(**setting, **how))
  np.testing.assert_allclose(got, want, 2e-6)
  for term, tree, want_tree in zip(TERMS, grads, want_grads, strict=True):
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_tree))
    assert size > 1e-4, term
    for a, b in zip(
      jax.tree.leaves(tree), jax.tree.leaves(want_tree), strict=True
    ):
      assert float(jnp.abs(a - b).max()) < 1e-5 * size, term


def test_a_step_reports_and_learns():
  config = make(optimizer__schedule__warmup=1.0, optimizer__learning_rate=0.01)
  model = build(config.model)
  step = jax.jit(make_train_step(config, model))
  state, batch = base_state(), make_batch()
  history = []
  for _ in range(50):
    state, metrics = step(state, batch)
    history.append(float(metrics["loss/xent"]))
  assert int(state.step) == 50
  assert history[-1] < 0.5 * history[0]
  assert metrics["tokens"] == batch["loss_mask"].sum()
  assert metrics["load_LE"].shape == (2, 4)
  np.testing.assert_allclose(metrics["load_LE"].sum(-1), 1, 1e-6)
  assert metrics["learning_rate"] == pytest.approx(0.01)


def test_jitter_differs_from_step_to_step():
  config = make(model__moe__router="top_k(k=2, jitter=0.9)")
  config = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30)
  )
  model = build(config.model)
  step = jax.jit(make_train_step(config, model))
  first, metrics = step(base_state(), make_batch())
  _, later = step(first, make_batch())
  assert metrics["loss/xent"] != later["loss/xent"]


def test_compiled_step_does_not_grow_with_depth():
  sizes = []
  for layers in (2, 16):
    config = make(model__num_layers=layers)
    model = build(config.model)
    state = jax.eval_shape(lambda c=config, m=model: init_state(c, m))
    lowered = jax.jit(make_train_step(config, model)).lower(state, make_batch())
    sizes.append(len(lowered.as_text()))
  assert sizes[1] < 1.05 * sizes[0]
