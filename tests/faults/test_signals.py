# SPDX-License-Identifier: Apache-2.0
"""Signals at the worst moments: what was done is saved, or done again alike."""

import os
import signal
import subprocess
import time

import pytest

from moejax.checkpoint import CheckpointReader
from tests.faults import faulty
from tests.small_run import command, environment
from tests.test_train import assert_same_run, train, wait_for_step


def start(place, workdir, *options):
  return subprocess.Popen(
    command("train", "--config=config.py", f"--workdir={workdir}", *options),
    cwd=place, env=environment() | {"PYTHONUNBUFFERED": "1"},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def finish(place, workdir, unbroken):
  done = train(place, workdir)
  assert done.returncode == 0, done.stderr
  assert_same_run(place / workdir, unbroken)


def test_sigterm_twice_before_the_first_step(place, unbroken):
  process = start(place, "early")
  for line in process.stdout:
    if "compiling the step" in line:
      break
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  out, error = process.communicate(timeout=300)
  assert process.returncode == 75, error
  assert "stopped at step 1, saved" in out
  assert CheckpointReader(place / "early" / "checkpoints").steps() == [1]
  finish(place, "early", unbroken)


@pytest.mark.parametrize("name, step", [("SIGTERM", 10), ("SIGINT", 7)])
def test_no_step_is_lost(place, unbroken, name, step):
  """Also at a step that is saved anyway."""
  done = train(place, name, *faulty.option(step, "signal", name))
  assert done.returncode == 75, done.stderr
  assert f"stopped at step {step}, saved" in done.stdout
  assert CheckpointReader(place / name / "checkpoints").latest() == step
  finish(place, name, unbroken)


def test_stopped_and_continued(place, unbroken):
  process = start(place, "paused")
  wait_for_step(place / "paused", 8, process)
  process.send_signal(signal.SIGSTOP)
  time.sleep(3)
  process.send_signal(signal.SIGCONT)
  _, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  assert_same_run(place / "paused", unbroken)


def test_out_of_memory(place, unbroken):
  """It may end a thread that a save waits for: that wait has an end."""
  done = train(
    place, "memory", *faulty.option(12, "limit_memory"),
    "--config.checkpoint.timeout=10",
  )  # fmt: skip
  assert done.returncode != 75
  if done.returncode == 0:  # it got by with what it had
    assert_same_run(place / "memory", unbroken)
    pytest.skip("this machine's allocator needed no more")
  assert CheckpointReader(place / "memory" / "checkpoints").latest() >= 5
  finish(place, "memory", unbroken)


def test_killed_right_after_a_save(place, unbroken):
  """SIGKILL while the background still writes step 10."""
  process = start(place, "torn")
  folder = place / "torn" / "checkpoints" / "10"
  limit = time.monotonic() + 120
  while not folder.exists() and time.monotonic() < limit:
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  finish(place, "torn", unbroken)
