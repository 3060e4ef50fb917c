# SPDX-License-Identifier: Apache-2.0
"""What comes back from a checkpoint is what went in, or an error."""

import logging
import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import (
  Checkpointer,
  CheckpointReader,
  state_digest,
)
from moejax.errors import CheckpointError


def test_round_trip_keeps_every_bit_structure_and_type(tmp_path, example):
  state = example.state(3)
  meta = {"step": 4, "data": {"next": 128}, "versions": ["a", "b"]}
  with Checkpointer(tmp_path / "with space/ü", keep_last=1) as ckpt:
    ckpt.save(4, state, meta)
  restored = CheckpointReader(tmp_path / "with space/ü").restore(
    example.abstract(state)
  )
  assert restored.step == 4
  assert restored.meta == meta
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  for got, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state)):
    assert got.dtype == want.dtype
    if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
      got, want = jax.random.key_data(got), jax.random.key_data(want)
    np.testing.assert_array_equal(got, want)
  assert state_digest(restored.state) == state_digest(state)
  # The keys are usable, not only equal.
  jax.random.normal(restored.state["rng"]["key"], (2,))


def test_relative_path_survives_a_change_of_folder(
  tmp_path, example, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with Checkpointer("run/ckpt/", keep_last=1) as ckpt:
    os.chdir("/")
    ckpt.save(1, example.state(), {})
  assert CheckpointReader(tmp_path / "run/ckpt").latest() == 1


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
  # Large enough that the write is still going on when the buffers are reused.
  state = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
  want, abstract = state_digest(state), {"w": state["w"]}
  abstract = jax.eval_shape(lambda s: s, state)
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
  )
  overwrite.lower(state).compile()
  sharding = state["w"].sharding
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, state, {})
    for _ in range(3):
      state = overwrite(state)
    jax.block_until_ready(state)
  abstract["w"] = jax.ShapeDtypeStruct(
    abstract["w"].shape, abstract["w"].dtype, sharding=sharding
  )
  restored = CheckpointReader(tmp_path).restore(abstract)
  assert state_digest(restored.state) == want


def test_meta_is_a_snapshot_and_must_be_json(tmp_path, example):
  with Checkpointer(tmp_path, keep_last=2) as ckpt:
    meta = {"data": [1]}
    ckpt.save(1, example.state(), meta)
    meta["data"].append(2)
    for bad in ({"x": jnp.ones(3)}, {"loss": float("nan")}):
      with pytest.raises(CheckpointError, match="not JSON"):
        ckpt.save(2, example.state(), bad)
  assert CheckpointReader(tmp_path).read_meta() == {"data": [1]}
  assert CheckpointReader(tmp_path).steps() == [1]


def test_save_does_not_wait_for_the_disk(tmp_path, example, monkeypatch):
  from moejax.checkpoint import layout

  may_commit, commit = threading.Event(), layout.commit

  def late_commit(*args):
    assert may_commit.wait(60)
    commit(*args)

  monkeypatch.setattr(layout, "commit", late_commit)
  with Checkpointer(tmp_path, keep_last=2) as ckpt:
    ckpt.save(1, example.state(), {})
    assert ckpt.latest() is None  # returned, and nothing exists yet
    ckpt.check()
    may_commit.set()
    ckpt.wait()
    assert ckpt.latest() == 1


def test_differing_leaves_are_all_listed_and_nothing_is_cast(tmp_path, example):
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, example.state(), {})
  wanted = example.abstract(example.state())
  sharding = wanted["params"]["embed"].sharding

  def leaf(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  wanted["params"]["embed"] = leaf((24, 8), jnp.bfloat16)
  wanted["params"]["layers"]["w_EDF"] = leaf((9, 4, 16), jnp.bfloat16)
  wanted["params"]["new"] = leaf((2,), jnp.float32)
  del wanted["router_state"]["bias_E"]
  with pytest.raises(CheckpointError) as e:
    CheckpointReader(tmp_path).restore(wanted)
  text = str(e.value)
  assert "4 leaves differ" in text
  for line in (
    "params/embed: float32[24,8] in the checkpoint, wanted bfloat16[24,8]",
    "params/layers/w_EDF: bfloat16[8,4,16] in the checkpoint, "
    "wanted bfloat16[9,4,16]",
    "params/new: not in the checkpoint, wanted float32[2]",
    "router_state/bias_E: float32[8] in the checkpoint, not wanted",
  ):
    assert line in text


@pytest.mark.parametrize(
  "state, message",
  [
    ({"a": 3}, "'a' is a int, not an array"),
    ({}, "no leaves"),
    (np.ones(3), "top-level keys"),
    ({"../x": np.ones(3)}, "top-level keys"),
    ({"a": {"b/c": np.ones(1), "b": {"c": np.ones(1)}}}, "two state leaves"),
    ({"a": {"b.c": np.ones(1), "b": {"c": np.ones(1)}}}, "two state leaves"),
  ],
)
def test_a_state_that_cannot_be_stored_is_refused(tmp_path, state, message):
  with Checkpointer(tmp_path / "c", keep_last=1) as ckpt:
    with pytest.raises(CheckpointError, match=message):
      ckpt.save(1, state, {})
    assert os.listdir(tmp_path / "c") == []


def test_restore_needs_a_sharding_on_each_leaf(tmp_path, example):
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, example.state(), {})
    with pytest.raises(CheckpointError, match=r"no sharding, such as '\w+"):
      ckpt.restore(jax.eval_shape(example.state))


def test_params_are_read_without_touching_the_optimizer(tmp_path, example):
  state = example.state(1)
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, state, {"step": 1})
  # Destroyed, so that a read or a check of it would be noticed.
  for path in (tmp_path / "1/arrays/opt_state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  wanted = {"params": example.abstract(state)["params"]}
  restored = CheckpointReader(tmp_path).restore_params(wanted)
  assert restored.meta == {"step": 1}
  assert state_digest(restored.state) == state_digest(
    {"params": state["params"]}
  )
  with pytest.raises(CheckpointError, match="opt_state"):
    CheckpointReader(tmp_path).restore(example.abstract(state))
  # Inside the part everything has to fit.
  del wanted["params"]["embed"]
  with pytest.raises(CheckpointError, match="params/embed"):
    CheckpointReader(tmp_path).restore_params(wanted)


def test_a_step_is_saved_once_and_in_order(tmp_path, example):
  with Checkpointer(tmp_path, keep_last=5) as ckpt:
    ckpt.save(5, example.state(), {})
    for step in (5, 4):
      with pytest.raises(CheckpointError, match=r"holds step 5"):
        ckpt.save(step, example.state(), {})
    ckpt.save(np.int64(6), example.state(), {})
  assert CheckpointReader(tmp_path).steps() == [5, 6]


def test_missing_steps_and_folders_are_clear_errors(tmp_path, example):
  reader = CheckpointReader(tmp_path / "none")
  assert reader.steps() == [] and reader.latest() is None
  assert reader.is_empty()
  wanted = example.abstract(example.state())
  for read in (reader.read_meta, lambda: reader.restore(wanted)):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*none"):
      read()
  with Checkpointer(tmp_path, keep_last=5) as ckpt:
    ckpt.save(1, example.state(), {})
    ckpt.save(2, example.state(), {})
  with pytest.raises(CheckpointError, match=r"step 7 .*available steps: 1, 2"):
    CheckpointReader(tmp_path).restore(wanted, step=7)


def test_keeps_the_newest_and_the_multiples(tmp_path, example):
  with Checkpointer(tmp_path, keep_last=2, keep_every=4) as ckpt:
    for step in range(1, 8):
      ckpt.save(step, {"w": jnp.ones(3)}, {})
  assert sorted(os.listdir(tmp_path), key=int) == ["4", "6", "7"]


def test_strays_are_ignored_with_one_warning(tmp_path, example, caplog):
  (tmp_path / "99/arrays").mkdir(parents=True)
  (tmp_path / "12_old").mkdir()
  (tmp_path / "07").mkdir()
  (tmp_path / "98").write_text("a file")
  state = example.state()
  with caplog.at_level(logging.WARNING, "moejax"):
    with Checkpointer(tmp_path, keep_last=1) as ckpt:
      ckpt.save(1, state, {})
      ckpt.save(2, state, {})
      ckpt.wait()
      assert ckpt.steps() == [2]
      assert ckpt.latest() == 2
      assert ckpt.restore(example.abstract(state)).step == 2
  (record,) = caplog.records
  for name in ("99", "12_old", "07", "98"):
    assert name in record.getMessage()
    assert (tmp_path / name).exists()


def test_a_stray_in_the_way_is_moved_aside(tmp_path, example):
  (tmp_path / "1").mkdir()
  (tmp_path / "1/keep.txt").write_text("mine")
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, example.state(), {})
  assert CheckpointReader(tmp_path).steps() == [1]
  assert (tmp_path / "1.stray/keep.txt").read_text() == "mine"


def test_own_leftovers_are_removed_by_the_writer_only(tmp_path, example):
  (tmp_path / "5/arrays.orbax-checkpoint-tmp").mkdir(parents=True)
  (tmp_path / "6").mkdir()
  (tmp_path / "6/manifest.json.tmp").write_text("")
  (tmp_path / "7").mkdir()
  assert CheckpointReader(tmp_path).latest() is None
  assert {p.name for p in tmp_path.iterdir()} == {"5", "6", "7"}
  Checkpointer(tmp_path, keep_last=1)
  assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_clear_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
    Checkpointer(tmp_path / "file", keep_last=1)


def test_state_digest_sees_name_type_shape_and_value(example):
  base = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.int32)}
  others = [
    {"c": base["a"], "b": base["b"]},
    base | {"a": jnp.zeros((3, 2))},
    base | {"b": jnp.zeros(4, jnp.uint32)},
    base | {"a": base["a"].at[1, 2].set(1e-30)},
    base | {"a": -base["a"]},
  ]
  digests = {state_digest(state) for state in [base, *others]}
  assert len(digests) == 6
  assert state_digest(dict(reversed(base.items()))) == state_digest(base)


RESHARD = """
import sys
sys.path.insert(0, {tests!r})
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from conftest import make_state
from moejax.checkpoint import Checkpointer, CheckpointReader, state_digest

state = make_state(7)
want = {want!r}
assert state_digest(state) == want and jax.device_count() == 8
for sizes in ((2, 4), (2,)):
  devices = jax.devices()[:sizes[0] * (sizes[1] if sizes[1:] else 1)]
  mesh = jax.make_mesh(sizes, ("x", "y")[:len(sizes)], devices=devices,
                       axis_types=(AxisType.Auto,) * len(sizes))
  def spec(x):
    if x.shape and x.shape[0] % sizes[0] == 0:
      return P("x", *("y" for n in x.shape[1:2] if sizes[1:] and n % 4 == 0))
    return P()
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), state)
  got = CheckpointReader({folder!r}).restore(abstract).state
  assert len(got["params"]["embed"].sharding.device_set) == len(devices)
  assert state_digest(got) == want, sizes
with Checkpointer({folder!r}, keep_last=5) as ckpt:
  ckpt.save(2, got, dict(devices=2))
"""


def test_restores_on_other_meshes_and_back(tmp_path, example):
  state = example.state(7)
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, state, {})
  script = textwrap.dedent(RESHARD).format(
    tests=os.path.dirname(__file__), want=state_digest(state),
    folder=str(tmp_path),
  )  # fmt: skip
  flags = "--xla_force_host_platform_device_count=8"
  subprocess.run(
    [sys.executable, "-c", script],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    check=True, timeout=120,
  )  # fmt: skip
  restored = CheckpointReader(tmp_path).restore(example.abstract(state))
  assert restored.meta == {"devices": 2}
  assert state_digest(restored.state) == state_digest(state)
