# SPDX-License-Identifier: Apache-2.0
"""The mesh, what lies where on it, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from moejax.config import Config, ParallelConfig
from moejax.errors import ConfigError
from moejax.models import build
from moejax.parallel import build_on_mesh, make_mesh, rules
from moejax.step import (
  abstract_state,
  init_state,
  make_train_step,
  state_shardings,
)
from tests.invariance.cells import Cell, batch


def on_mesh(mesh="fsdp2-ep2-tp2", **changes):
  """A config, its mesh and where its state lies."""
  config = Cell(mesh, dispatch="ragged").config()
  model = dataclasses.replace(config.model, **changes)
  config = dataclasses.replace(config, model=model)
  mesh = make_mesh(
    config.parallel, jax.devices()[: config.parallel.num_devices]
  )
  return config, mesh, state_shardings(config, build(model), mesh)


def test_a_mesh_of_all_devices():
  mesh = make_mesh(ParallelConfig(data=2, expert=4))
  assert dict(mesh.shape) == {
    "data": 2, "fsdp": 1, "expert": 4, "tensor": 1, "sequence": 1
  }  # fmt: skip
  assert mesh.size == 8
  assert make_mesh(ParallelConfig()).size == 1


@pytest.mark.parametrize(
  "sizes, fix",
  [
    ({"expert": 4}, "--config.parallel.data=2"),
    ({"fsdp": 2, "data": 8}, "--config.parallel.data=4"),
    ({"tensor": 3}, "other sizes, with a product of 8"),
  ],
)
def test_another_number_of_devices(sizes, fix):
  with pytest.raises(ConfigError, match=f"there are 8; use {fix}"):
    make_mesh(ParallelConfig(**sizes))


def test_tables():
  where = lambda *axes: (
    rules.used(PartitionSpec(*axes)), rules.stored(PartitionSpec(*axes))
  )  # fmt: skip
  used, stored = where("expert", "embed", "mlp")
  assert used == PartitionSpec(("expert",), None, ("tensor",))
  assert stored == PartitionSpec(("expert",), ("fsdp",), ("tensor",))
  used, stored = where("expert", "mlp_rows", None)
  assert used == PartitionSpec(("expert",), ("tensor",), None)
  assert stored == PartitionSpec(("expert",), ("tensor", "fsdp"), None)
  used, stored = where("layers", "embed", "heads", "head_dim")
  assert used == PartitionSpec(None, None, ("tensor",), None)
  assert stored == PartitionSpec(None, ("fsdp", "expert"), ("tensor",), None)
  used, stored = where("batch", "tokens", None)
  assert used == stored
  assert used == PartitionSpec(("data", "fsdp", "expert"), ("sequence",), None)
  assert where("norm") == (PartitionSpec(None),) * 2


def test_each_device_has_its_part_of_weights_and_moments():
  """No device ever has more: the state is made in parts."""
  config, mesh, shardings = on_mesh()
  model = build(config.model)
  state = jax.jit(
    lambda: init_state(config, model), out_shardings=shardings
  )()  # fmt: skip
  whole = sum(x.size for x in jax.tree.leaves(state.params))
  moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
  for tree in (state.params, *moments):
    here = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
    # What is replicated is a few vectors.
    assert whole / 8 <= here < 1.1 * whole / 8
  alone = jax.jit(lambda: init_state(config, model))()
  drawn = jax.tree.leaves(state.params)
  for one, other in zip(drawn, jax.tree.leaves(alone.params)):
    np.testing.assert_array_equal(one, other)


def test_copies_of_the_parameters_share_their_moments():
  config, _, shardings = on_mesh("dp2-ep4")
  shapes = jax.eval_shape(lambda: init_state(config, build(config.model)))

  def share(tree, where):
    """Elements on a device."""
    sizes = jax.tree.map(
      lambda x, at: np.prod(at.shard_shape(x.shape)), tree, where
    )
    return sum(jax.tree.leaves(sizes))

  whole = sum(x.size for x in jax.tree.leaves(shapes.params))
  assert whole / 4 <= share(shapes.params, shardings.params) < 1.1 * whole / 4
  for name in ("mu", "nu"):
    tree, where = (
      optax.tree.get(state.opt_state, name) for state in (shapes, shardings)
    )
    assert whole / 8 <= share(tree, where) < 1.1 * whole / 8


def test_moments_of_muon_lie_where_those_of_adam_do():
  config, mesh, of_adam = on_mesh()
  optimizer = dataclasses.replace(config.optimizer, name="muon")
  config = dataclasses.replace(config, optimizer=optimizer)
  of_muon = state_shardings(config, build(config.model), mesh)
  want = {
    _own_path(path): where
    for path, where in _leaves(optax.tree.get(of_adam.opt_state, "mu"))
  }
  found = [
    (_own_path(path), where)
    for path, where in _leaves(of_muon.opt_state)
    if _own_path(path)
  ]
  # One of each matrix that Muon moves, two of all else.
  counts = {path: [p for p, _ in found].count(path) for path in want}
  assert set(counts.values()) == {1, 2} and len(found) == sum(counts.values())
  assert all(n == 1 for path, n in counts.items() if "w_up_EDF" in path)
  for path, where in found:
    assert where == want[path], path


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def _own_path(path) -> str:
  """What a moment's path has of its parameter's."""
  keys = [k.key if hasattr(k, "key") else None for k in path]
  start = max((i + 1 for i, k in enumerate(keys) if k is None), default=0)
  return "/".join(keys[start:])


def test_a_parameter_that_does_not_divide_is_named():
  with pytest.raises(ConfigError) as caught:
    on_mesh("fsdp4", d_model=30)
  message = str(caught.value)
  assert "30 does not divide by parallel.fsdp * parallel.expert = 4" in message
  assert "; use 28 or 32" in message and "w_" in message


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"parallel": {"expert": 3}}, "num_experts=8 does not divide by parallel.*"
     "use parallel.expert=2 or model.moe.num_experts=6 or 9"),
    ({"parallel": {"tensor": 4}}, "num_kv_heads=2 does not divide by"),
    ({"parallel": {"sequence": 5}}, "data.seq_len=32 does not divide"),
    ({"parallel": {"data": 5}}, "train.batch_size=32 does not divide"),
    ({"parallel": {"expert": 0}}, "parallel.expert=0 must be positive"),
    ({"parallel": {"exchange": "all"}}, "exchange='all' is not one of"),
    ({"parallel": {"receive_factor": 0.5}}, "must be 0 or at least 1"),
    ({"parallel": {"data": 4}, "eval": {"batch_size": 6}},
     "eval.batch_size=6 does not divide into"),
  ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(changes, message):
  values = Cell().config().to_dict()
  for section, options in changes.items():
    values[section] |= options
  if changes["parallel"].keys() & {"expert", "data"}:
    values["train"]["batch_size"] = 32 if "data" in changes["parallel"] else 30
  with pytest.raises(ConfigError, match=message):
    Config.from_dict(values)


def test_rows_to_and_fro_need_sorted_ones():
  config = Cell("ep2", dispatch="dense", exchange="all_to_all").config()
  with pytest.raises(ConfigError, match="with dense use all_gather"):
    build_on_mesh(config, make_mesh(config.parallel, jax.devices()[:2]))


@pytest.mark.parametrize("mesh", ["fsdp2-ep2-tp2", "dp2-ep4", "sequence2"])
def test_steps_are_those_of_one_device(mesh):
  """Parameters, moments and router biases; replicas are equal bit by bit."""
  router = "group_limited(k=2, num_groups=4, topk_groups=2, bias_rate=0.01)"

  def trained(mesh):
    config = Cell(mesh, dispatch="ragged", router=router).config()
    # A small eps makes a step of any gradient, also of one that is rounding.
    config = dataclasses.replace(
      config,
      optimizer=dataclasses.replace(config.optimizer, eps=1e-3),
    )
    where = make_mesh(
      config.parallel, jax.devices()[: config.parallel.num_devices]
    )
    model = build_on_mesh(config, where)
    shardings = state_shardings(config, model, where)
    make = lambda: init_state(config, model)
    state = jax.jit(make, out_shardings=shardings)()
    step = jax.jit(
      make_train_step(config, model), out_shardings=(shardings, None)
    )
    rows = {
      name: jax.device_put(x, model.placement.sharding(PartitionSpec("batch")))
      for name, x in batch().items()
    }
    for _ in range(4):
      state, metrics = step(state, rows)
    return state, metrics

  state, metrics = trained(mesh)
  want, want_metrics = trained("one")
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  assert jnp.abs(jax.tree.leaves(want.router_state)[0]).max() > 0.03
  for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(want)):
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      continue
    one_, other = np.float64(one), np.float64(other)
    assert np.linalg.norm(one_ - other) <= 2e-5 * np.linalg.norm(other)
    parts = {}
    for shard in one.addressable_shards:
      twin = parts.setdefault(str(shard.index), np.asarray(shard.data))
      np.testing.assert_array_equal(shard.data, twin)


def test_abstract_states_say_where():
  config, _, shardings = on_mesh()
  state = abstract_state(config, build(config.model), shardings)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
