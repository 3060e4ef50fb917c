# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, the newest step that exists is whole."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from moejax.checkpoint import Checkpointer, CheckpointReader, state_digest

# Saves without a break until killed; `kill_at` names a function of the writer
# inside which the process kills itself.
WRITER = """
import os, signal, sys
folder, kill_at, count = sys.argv[1:]
import jax, jax.numpy as jnp
from moejax.checkpoint import Checkpointer, files, layout, state_digest

def state(step):
  return {"params": {"w": jnp.full((300_000,), step, jnp.float32)},
          "opt_state": [jnp.arange(100_000) * step, jnp.int32(step)]}

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

with Checkpointer(folder, keep_last=1) as ckpt:
  first = (ckpt.latest() or 0) + 1
  for step in range(first, first + int(count)):
    s = state(step)
    if step == first + 1:
      ckpt.wait()
      if kill_at == "before the rename":
        files.rename = die
      if kill_at == "while deleting":
        remove = files.remove
        def remove_one_and_die(path):
          if path.name == "arrays":
            remove(path / "params")
            die()
          remove(path)
        files.remove = remove_one_and_die
    ckpt.save(step, s, {"step": step, "digest": state_digest(s)})
    print(step, flush=True)
"""


def start(folder, kill_at: str, count: int) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", WRITER, str(folder), kill_at, str(count)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def assert_newest_is_whole(folder, at_least: int) -> int:
  """Restores, then saves once more as the next run would; returns the step."""
  state = {
    "params": {"w": jnp.zeros(300_000)},
    "opt_state": [jnp.arange(100_000), jnp.int32(0)],
  }
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  # As a reader beside the run, then as the next run.
  step = CheckpointReader(folder).latest()
  with Checkpointer(folder, keep_last=1) as ckpt:
    restored = ckpt.restore(abstract)
    assert restored.step == step >= at_least
    assert restored.meta["step"] == step
    assert state_digest(restored.state) == restored.meta["digest"]
    ckpt.save(step + 1, restored.state, restored.meta)
  assert os.listdir(folder) == [str(step + 1)]
  return step


def test_killed_at_random_moments(tmp_path):
  rng = random.Random(0)
  folders = [tmp_path / str(i) for i in range(2)]
  writers = [start(folder, "", 10**6) for folder in folders]
  try:
    for writer, folder in zip(writers, folders):
      step = 0
      while step < 3:
        step = int(writer.stdout.readline())
      time.sleep(rng.random() * 0.5)
      writer.send_signal(signal.SIGKILL)
      last = [int(line) for line in writer.stdout.read().split()]
      # A save that returned has finished the one before it.
      assert_newest_is_whole(folder, at_least=max([step, *last]) - 1)
  finally:
    for writer in writers:
      writer.kill()
      writer.communicate()


@pytest.mark.parametrize(
  "moment, newest",
  [("before the rename", 1), ("while deleting", 2)],
)
def test_killed_at_the_worst_moments(tmp_path, moment, newest):
  writer = start(tmp_path, moment, 5)
  _, errors = writer.communicate(timeout=120)
  assert writer.returncode == -signal.SIGKILL, errors
  names = set(os.listdir(tmp_path))
  assert names == {"1", "2"}, "the kill came too early or too late"
  assert CheckpointReader(tmp_path).steps() == [newest]
  assert assert_newest_is_whole(tmp_path, at_least=newest) == newest
