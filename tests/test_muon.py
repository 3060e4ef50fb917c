# SPDX-License-Identifier: Apache-2.0
"""Muon is Muon of matrices and Adam, not NAdam, of the rest; it resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from moejax.cli import parse_config
from moejax.optimizer import make_optimizer, matrix_axes
from moejax.train import train
from tests.small_run import make_place
from tests.test_optimizer import SEVERAL, with_rates
from tests.test_train import assert_same_run


def muon_and_norms():
  """Parameters and a few gradients: matrices, stacked or not, and the rest."""
  rng = np.random.default_rng(1)
  draw = lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
  params = jax.tree.map(draw, SEVERAL)
  return params, [jax.tree.map(draw, SEVERAL) for _ in range(3)]


def updates_of(optimizer, params, all_grads):
  """Of each gradient in turn, at the same parameters."""
  state, found = optimizer.init(params), []
  for grads in all_grads:
    updates, state = optimizer.update(grads, state, params)
    found.append(updates)
  return found


MUON = {"clip_norm": 0.0, "weight_decay": 0.0, "mu_dtype": "float32"}


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_what_is_no_matrix_moves_as_by_adam_not_nadam(mu_dtype):
  params, grads = muon_and_norms()
  options = MUON | {"mu_dtype": mu_dtype, "b1": 0.8}
  got, want = (
    updates_of(make_optimizer(with_rates(name=name, **options)), params, grads)
    for name in ("muon", "adamw")
  )
  for one, other in zip(got, want):
    for path in (("norm", "scale"), ("moe", "w_router_DE")):
      x, y = one[path[0]][path[1]], other[path[0]][path[1]]
      np.testing.assert_array_equal(x, y, err_msg="/".join(path))
  constant = jax.tree.map(lambda p: jnp.full_like(p, 0.3), params)
  muon = make_optimizer(with_rates(name="muon", **MUON))
  for updates in updates_of(muon, params, [constant] * 3):
    np.testing.assert_allclose(updates["norm"]["scale"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_matrices_move_as_by_muon_of_optax(mu_dtype):
  params, grads = muon_and_norms()
  config = with_rates(name="muon", **(MUON | {"mu_dtype": mu_dtype, "b1": 0.8}))
  axes = matrix_axes(params, config.optimizer.muon_adam)
  theirs = optax.contrib.muon(
    1.0, beta=0.8, eps=config.optimizer.eps, mu_dtype=mu_dtype,
    consistent_rms=0.2, muon_weight_dimension_numbers=axes,
  )  # fmt: skip
  got = updates_of(make_optimizer(config), params, grads)
  matrices = [path for path, a in _by_path(axes).items() if a is not None]
  assert len(matrices) == 3
  for one, other in zip(got, updates_of(theirs, params, grads)):
    for path in matrices:
      x, y = _by_path(one)[path], _by_path(other)[path]
      np.testing.assert_allclose(x, -y, rtol=1e-6, atol=1e-7, err_msg=path)


def test_routers_and_their_further_projections_are_adams():
  """`router_noise/w_DE` is a vector for each expert, and a router's."""
  params = {"moe": {"w_router_DE": jnp.ones((4, 3)), "w_up_EDF": jnp.ones(
    (3, 4, 2)), "router_noise": {"w_DE": jnp.ones((4, 3))}}}  # fmt: skip
  adam = with_rates(name="muon", **MUON).optimizer.muon_adam
  for patterns in (adam, ("w_router",)):
    axes = _by_path(matrix_axes(params, patterns))
    matrices = [path for path, found in axes.items() if found is not None]
    assert matrices == ["moe/w_up_EDF"]


def _by_path(tree):
  is_leaf = lambda x: x is None or isinstance(x, tuple)
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {"/".join(k.key for k in path): leaf for path, leaf in found}


def test_a_run_with_muon_resumes_exactly(tmp_path, monkeypatch):
  monkeypatch.chdir(make_place(tmp_path))

  def trained(name, steps):
    options = {
      "optimizer.name": "muon", "optimizer.schedule.decay": 0,
      "train.num_steps": steps, "eval.every": 0, "checkpoint.every": 4,
    }  # fmt: skip
    words = [f"--config.{k}={v}" for k, v in options.items()]
    assert train(parse_config("config.py", words), name, report=False) == 0

  trained("whole", 12)
  trained("stopped", 6)
  trained("stopped", 12)
  assert_same_run(tmp_path / "stopped", tmp_path / "whole")
