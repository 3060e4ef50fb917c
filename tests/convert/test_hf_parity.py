# SPDX-License-Identifier: Apache-2.0
"""Logits, gradients and greedy tokens against Hugging Face, every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.generate import generate_tokens
from moejax.models import Rows, build, init_variables
from moejax.sampling import Sampling
from tests.convert import families as hf

EACH = pytest.mark.parametrize("family", hf.FAMILIES, ids=lambda f: f.name)


def to_tree(family, tensors):
  """Our tree from hub tensors; linear, so it maps gradients too."""
  tree = {}
  for rule in family.rules(family.config):
    leaves = rule.load([tensors[name] for name in rule.names])
    for path, leaf in zip(rule.paths, leaves, strict=True):
      node = tree
      for key in path[:-1]:
        node = node.setdefault(key, {})
      node[path[-1]] = jnp.asarray(leaf)
  return tree


def relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  # An expert that no token chose has zero gradients.
  return np.abs(got - want).max() / (np.abs(want).max() or 1.0)


def reference(family):
  with np.load(family.file) as file:
    return dict(file)


@EACH
def test_the_rules_make_the_models_own_tree(family):
  model = build(family.config)
  variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  tree = to_tree(family, hf.tensors(family))
  assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, variables)


@EACH
def test_there_and_back_is_the_same(family):
  tensors = hf.tensors(family)
  for rule in family.rules(family.config):
    there = [tensors[name] for name in rule.names]
    for name, back in zip(rule.names, rule.save(rule.load(there)), strict=True):
      np.testing.assert_array_equal(back, tensors[name], err_msg=name)


@pytest.mark.parametrize(
  "family, dispatch",
  [(f, "ragged") for f in hf.FAMILIES]
  + [(f, "dense") for f in hf.FAMILIES if f.name in ("olmoe", "jetmoe")],
  ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_logits_and_gradients(family, dispatch):
  moe = dataclasses.replace(family.config.moe, dispatch=dispatch)
  model = build(dataclasses.replace(family.config, moe=moe))
  tokens, cotangent = hf.inputs()
  positions = jnp.tile(jnp.arange(hf.T), (hf.B, 1))
  rows = Rows(jnp.ones((hf.B, hf.T), jnp.int32), positions)

  @jax.jit
  def logits_and_gradients(variables):
    def logits(variables):
      out = model.apply(variables, jnp.asarray(tokens), rows)
      return model.apply(variables, out.hidden_BTD, method="logits")

    value, pull = jax.vjp(logits, variables)
    return value, pull(jnp.asarray(cotangent))[0]

  logits, grads = logits_and_gradients(to_tree(family, hf.tensors(family)))
  want = reference(family)
  assert relative_error(logits, want["logits"]) < 3e-6
  stored = {
    name.removeprefix("grad/"): value
    for name, value in want.items()
    if name.startswith("grad/")
  }
  errors = jax.tree.map(relative_error, grads, to_tree(family, stored))
  assert max(jax.tree.leaves(errors)) < 1e-5, errors


@EACH
def test_greedy_tokens_with_a_cache(family):
  tokens, _ = hf.inputs()
  got = generate_tokens(
    build(family.config), to_tree(family, hf.tensors(family)), tokens.tolist(),
    hf.NEW, Sampling(temperature=0), jax.random.key(0),
  )  # fmt: skip
  np.testing.assert_array_equal(got, reference(family)["greedy"])


@pytest.mark.parametrize(
  "family",
  [
    f
    for f in hf.FAMILIES
    if f.name in ("qwen3_moe", "jetmoe", "hunyuan_v1_moe")
  ],
  ids=lambda f: f.name,
)
def test_scanned_layers_are_the_same(family):
  apart = family.config
  scanned = dataclasses.replace(apart, scan_layers=True)
  variables = to_tree(family, hf.tensors(family))
  params = variables["params"]
  repeats = [params[f"repeats_{r}"] for r in range(apart.num_repeats)]
  stacked = {k: v for k, v in params.items() if not k.startswith("repeats")}
  stacked["repeats"] = jax.tree.map(lambda *xs: jnp.stack(xs), *repeats)
  tokens, _ = hf.inputs()
  rows = Rows(
    jnp.ones((hf.B, hf.T), jnp.int32), jnp.tile(jnp.arange(hf.T), (hf.B, 1))
  )
  one, two = (
    jax.jit(build(config).apply)(p, jnp.asarray(tokens), rows)
    for config, p in ((apart, variables), (scanned, {"params": stacked}))
  )
  assert relative_error(two.hidden_BTD, one.hidden_BTD) < 1e-6
  for x, y in zip(jax.tree.leaves(one.stats), jax.tree.leaves(two.stats)):
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.hf
def test_the_files_are_what_transformers_computes(family):
  pytest.importorskip("transformers", reason="the [hf] extra is not installed")
  pytest.importorskip("torch", reason="the [hf] extra is not installed")
  got, want = hf.compute(family), reference(family)
  assert sorted(got) == sorted(want)
  for name, value in want.items():
    assert relative_error(got[name], value) < 1e-5, name
