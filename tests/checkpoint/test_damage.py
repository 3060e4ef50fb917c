# SPDX-License-Identifier: Apache-2.0
"""Every changed byte of a checkpoint is found, named, and never restored."""

import json
import logging
import os
import random
import shutil

import jax
import jax.numpy as jnp
import pytest

from moejax.checkpoint import Checkpointer, CheckpointReader, state_digest
from moejax.errors import CheckpointError


def state_of(step: int):
  return {
    "params": {"w": jnp.arange(64.0) + step, "b": jnp.full(3, step)},
    "opt_state": {"count": jnp.int32(step)},
  }


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state_of(0),
  )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pristine")
  with Checkpointer(folder, keep_last=9) as ckpt:
    for step in (1, 2, 3):
      ckpt.save(step, state_of(step), {"step": step})
  return folder


@pytest.fixture
def folder(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / "checkpoints")


def files_of(folder):
  return sorted(p for p in (folder / "3").rglob("*") if p.is_file())


def flip_bit(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def assert_found(folder, path):
  """Step 3 is refused when asked for, with the file's name."""
  with pytest.raises(CheckpointError) as e:
    CheckpointReader(folder).restore(abstract(), step=3)
  text = str(e.value)
  assert path.relative_to(folder / "3").as_posix() in text
  assert "damaged" in text and "available steps: 1, 2" in text


def test_pristine_restores(folder):
  assert len(files_of(folder)) > 15
  restored = CheckpointReader(folder).restore(abstract(), step=3)
  assert state_digest(restored.state) == state_digest(state_of(3))


@pytest.mark.parametrize("seed", range(4))
def test_one_flipped_bit_in_any_file(folder, seed):
  rng = random.Random(seed)
  for path in files_of(folder):
    before = path.read_bytes()
    flip_bit(path, rng)
    assert_found(folder, path)
    path.write_bytes(before)


def test_every_bit_of_the_manifest_and_meta(folder):
  for name in ("manifest.json", "meta.json"):
    path = folder / "3" / name
    before = path.read_bytes()
    # All of the short file, a sample of the long one.
    step = max(1, len(before) * 8 // 200)
    for bit in range(0, len(before) * 8, step):
      data = bytearray(before)
      data[bit // 8] ^= 1 << bit % 8
      path.write_bytes(data)
      with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        CheckpointReader(folder).read_meta(step=3)
    path.write_bytes(before)
  assert CheckpointReader(folder).read_meta(step=3) == {"step": 3}


@pytest.mark.parametrize("how", ["truncated", "emptied", "longer", "deleted"])
def test_any_file_cut_or_gone(folder, how):
  for path in files_of(folder):
    before = path.read_bytes()
    match how:
      case "truncated":
        path.write_bytes(before[: len(before) // 2])
      case "emptied":
        path.write_bytes(b"")
      case "longer":
        path.write_bytes(before + b"\0")
      case "deleted":
        path.unlink()
    if how == "deleted" and path.name == "manifest.json":
      # Without its manifest a step does not exist.
      with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        CheckpointReader(folder).restore(abstract(), step=3)
    else:
      assert_found(folder, path)
    path.write_bytes(before)


@pytest.mark.parametrize(
  "where", ["extra", "arrays/extra", "arrays/params/d/extra", "arrays/new/x"]
)
def test_added_file(folder, where):
  path = folder / "3" / where
  path.parent.mkdir(exist_ok=True)
  path.write_text("x")
  assert_found(folder, path)


def test_added_link(folder):
  path = folder / "3/arrays/params/link"
  path.symlink_to("/etc/hostname")
  assert_found(folder, path)


def test_damaged_newer_steps_are_passed_over_loudly(folder, caplog):
  flip_bit(folder / "3/meta.json", random.Random(0))
  (folder / "2/manifest.json").write_text("{}")
  reader = CheckpointReader(folder)
  with caplog.at_level(logging.WARNING, "moejax"):
    restored = reader.restore(abstract())
  assert restored.step == 1 and restored.meta == {"step": 1}
  assert state_digest(restored.state) == state_digest(state_of(1))
  messages = [r.getMessage() for r in caplog.records]
  assert len(messages) == 2
  assert "step 3" in messages[0] and "meta.json: digest" in messages[0]
  assert "step 2" in messages[1] and "manifest.json: differs" in messages[1]
  assert reader.latest() == 1 and reader.steps() == [1]


def test_nothing_intact_says_why_for_each(folder):
  for step in (1, 2, 3):
    os.remove(folder / str(step) / "meta.json")
  reader = CheckpointReader(folder)
  with pytest.raises(CheckpointError) as e:
    reader.restore(abstract())
  assert reader.steps() == [] and not reader.is_empty()
  for step in (1, 2, 3):
    assert f"step {step}: meta.json: missing" in str(e.value)


def test_a_renamed_step_is_not_another_step(folder):
  os.rename(folder / "3", folder / "30")
  reader = CheckpointReader(folder)
  assert reader.latest() == 2
  with pytest.raises(CheckpointError, match="belongs to step 3"):
    reader.restore(abstract(), step=30)


def test_another_format_is_an_error_not_damage(folder):
  path = folder / "3/manifest.json"
  body = json.loads(path.read_text())
  del body["sha256"]
  body["format"] = 99
  from moejax.checkpoint.manifest import _with_checksum

  path.write_text(_with_checksum(body))
  with pytest.raises(CheckpointError, match="of format 99"):
    CheckpointReader(folder).restore(abstract())


def test_training_goes_on_past_a_damaged_step_and_replaces_it(folder):
  flip_bit(files_of(folder)[0], random.Random(1))
  (folder / "2/manifest.json").write_text("{}")
  with Checkpointer(folder, keep_last=2) as ckpt:
    assert ckpt.restore(abstract()).step == 1
    ckpt.save(2, state_of(20), {"step": 20})
    ckpt.wait()
    assert ckpt.steps() == [1, 2] and (folder / "3").exists()
    ckpt.save(4, state_of(4), {})
  assert sorted(os.listdir(folder)) == ["2", "4"]
  restored = CheckpointReader(folder).restore(abstract(), step=2)
  assert state_digest(restored.state) == state_digest(state_of(20))


def test_a_step_deleted_while_it_is_read_gives_way_to_a_newer(
  folder, monkeypatch
):
  from moejax.checkpoint import arrays

  read = arrays.restore

  def deleted_first(path, wanted):
    if path.parent.name == "3":
      shutil.rmtree(path.parent)
      shutil.copytree(folder / "2", folder / "2copy")
    return read(path, wanted)

  monkeypatch.setattr(arrays, "restore", deleted_first)
  assert CheckpointReader(folder).restore(abstract()).step == 2


def test_an_intact_step_that_cannot_be_read_is_not_passed_over(
  folder, monkeypatch
):
  from moejax.checkpoint import arrays

  def fail(path, wanted):
    raise MemoryError("no room for the arrays")

  monkeypatch.setattr(arrays, "restore", fail)
  with pytest.raises(CheckpointError, match=r"intact but .*no room"):
    CheckpointReader(folder).restore(abstract())
