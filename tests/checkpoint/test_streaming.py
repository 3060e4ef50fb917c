# SPDX-License-Identifier: Apache-2.0
"""Steps written and read leaf by leaf."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moejax.checkpoint import (
  Checkpointer,
  CheckpointReader,
  StepWriter,
  arrays,
)
from moejax.checkpoint.leaves import describe
from moejax.errors import CheckpointError

RNG = np.random.default_rng(0)
STATE = {
  "params": {
    "embed": RNG.standard_normal((11, 6)).astype(ml_dtypes.bfloat16),
    "layers": {"w_EDF": RNG.standard_normal((7, 4, 3)).astype(np.float32)},
    "zeros": np.zeros(5, np.float32),
  },
  "router_state": {"bias": RNG.standard_normal(9).astype(np.float32)},
}
TABLE = describe(STATE)
LEAVES = dict(zip(TABLE, jax.tree.leaves(STATE), strict=True))


def write(folder, names=tuple(LEAVES)):
  writer = StepWriter(folder, 4, TABLE, "a source")
  for name in names:
    writer.write(name, LEAVES[name])
  return writer


def abstract():
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), STATE
  )


@pytest.mark.parametrize("chunk_bytes", [1, 30, 1 << 20])
def test_any_reader_finds_the_state(chunk_bytes, tmp_path, monkeypatch):
  monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk_bytes)
  write(tmp_path).commit({"step": 4})
  reader = CheckpointReader(tmp_path)
  restored = reader.restore(abstract())
  jax.tree.map(np.testing.assert_array_equal, restored.state, STATE)
  assert restored.meta == {"step": 4}
  _, _, leaves = reader.open_leaves({"params", "router_state"})
  for name, leaf in LEAVES.items():
    np.testing.assert_array_equal(leaves.read(name), leaf)
    np.testing.assert_array_equal(leaves.read(name, 3), leaf[3])
  # Orbax itself, which knows nothing of this writer.
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
    params = plain.restore(tmp_path / "4/arrays/params")
  jax.tree.map(np.testing.assert_array_equal, params, STATE["params"])


def test_leaves_of_a_step_that_was_saved_whole(tmp_path):
  state = jax.tree.map(jnp.asarray, STATE)
  with Checkpointer(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(2, state, {})
  _, _, leaves = CheckpointReader(tmp_path).open_leaves({"params"})
  for name, leaf in LEAVES.items():
    np.testing.assert_array_equal(leaves.read(name), leaf)
    np.testing.assert_array_equal(leaves.read(name, 1), leaf[1])


def test_params_come_in_the_dtype_that_is_stored(tmp_path):
  write(tmp_path).commit({})
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
    {"params": abstract()["params"]},
  )
  state = CheckpointReader(tmp_path).restore_params(wanted).state
  assert state["params"]["embed"].dtype == jnp.bfloat16
  with pytest.raises(CheckpointError, match="embed: bfloat16.* float32"):
    CheckpointReader(tmp_path).restore(
      wanted | {"router_state": abstract()["router_state"]}
    )


def test_an_unfinished_step_is_none_and_goes_on(tmp_path):
  writer = write(tmp_path, list(LEAVES)[:2])
  with pytest.raises(CheckpointError, match="2 leaves are not written"):
    writer.commit({})
  assert CheckpointReader(tmp_path).latest() is None
  with (tmp_path / "4/journal.jsonl").open("a") as f:
    f.write('{"leaf": "params/zeros", "fi')  # what a kill leaves
  again = StepWriter(tmp_path, 4, TABLE, "a source")
  rest = list(again.pending())
  assert rest == list(LEAVES)[2:]
  for name in rest:
    again.write(name, LEAVES[name])
  again.commit({})
  state = CheckpointReader(tmp_path).restore(abstract()).state
  jax.tree.map(np.testing.assert_array_equal, state, STATE)
  with pytest.raises(CheckpointError, match="4 is there already"):
    StepWriter(tmp_path, 4, TABLE, "a source")


def test_what_does_not_fit_is_refused(tmp_path):
  writer = write(tmp_path, [])
  with pytest.raises(CheckpointError, match=r"float32\[5\], not bfloat16"):
    writer.write("params/embed", LEAVES["params/zeros"])
  with pytest.raises(CheckpointError, match="unfinished work on a source"):
    StepWriter(tmp_path, 4, TABLE, "another")


def test_a_flipped_byte_is_noticed(tmp_path):
  write(tmp_path).commit({})
  (chunk,) = (tmp_path / "4/arrays/params/embed").glob("[0-9]*")
  data = bytearray(chunk.read_bytes())
  data[7] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match="embed/0.0: digest"):
    CheckpointReader(tmp_path).open_leaves({"params"})
