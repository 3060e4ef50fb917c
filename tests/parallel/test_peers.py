# SPDX-License-Identifier: Apache-2.0
"""What a process says of the others, and when it ends because of them."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from moejax.parallel import peers
from moejax.parallel.peers import EXIT_PEER_LOST, Peers
from tests.small_run import environment

SCRIPT = """
import os, signal, sys, time
from moejax.parallel.peers import Peers

folder, how = sys.argv[1:]
with Peers(folder, 7, 0, 2, 100), Peers(folder, 7, 1, 2, 100):
  time.sleep(1)
  os.abort() if how == "itself" else os.kill(os.getpid(), signal.SIGABRT)
  time.sleep(5)
with Peers(folder, 8, 1, 2, 100):
  pass
os.abort()
"""


@pytest.mark.parametrize("how", ["itself", "from outside"])
def test_an_abort_ends_it_and_names_the_leader(tmp_path, how):
  done = subprocess.run(
    [sys.executable, "-X", "faulthandler", "-c", SCRIPT, str(tmp_path), how],
    env=environment(), capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == -signal.SIGABRT
  assert "process 1 of 2 was aborted, as said above" in done.stderr
  assert "is process 0 (pid " in done.stderr
  # Who listened before still does.
  assert "Fatal Python error: Aborted" in done.stderr


ENDS = """
import sys, time
from moejax.parallel import peers

folder, seconds = sys.argv[1], float(sys.argv[2])
peers.PATIENCE = 3.0
other = peers.Peers(folder, 7, 1, 2, 100)
other._folder.mkdir()
other._write("its disk is full")
with peers.Peers(folder, 7, 0, 2, 100) as me:
  time.sleep(seconds)
  print("said what was wrong here")
  me.leave("a reason of its own")
  began = time.monotonic()
  me.wait_for_others()
  print(f"waited {time.monotonic() - began:.0f}")
"""


def run_with_one_that_ended(folder, seconds):
  return subprocess.run(
    [sys.executable, "-c", ENDS, str(folder), str(seconds)],
    env=environment(), capture_output=True, text=True, timeout=60,
  )  # fmt: skip


def test_one_that_ends_by_itself_is_left_to_say_why(tmp_path):
  """Another may have said why a moment before, as of a save that failed."""
  done = run_with_one_that_ended(tmp_path, 1.5)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "said what was wrong here\nwaited 0\n"


def test_one_that_does_not_end_is_ended(tmp_path):
  done = run_with_one_that_ended(tmp_path, 30)
  assert (done.returncode, done.stdout) == (EXIT_PEER_LOST, "")
  assert "ended: its disk is full. Start all again" in done.stderr


@pytest.mark.parametrize("ends", [True, False])
def test_the_leader_waits_for_the_others(tmp_path, ends, monkeypatch):
  """When it ends, JAX aborts them: they may be about to say why."""
  monkeypatch.setattr(peers, "PATIENCE", 2.0)
  leader, other = (Peers(tmp_path, 7, i, 2, 100) for i in range(2))
  leader._folder.mkdir()
  other._write(None)
  leader.leave("a reason")
  if ends:
    threading.Timer(0.7, other.leave, ["a reason"]).start()
  began = time.monotonic()
  leader.wait_for_others()
  waited = time.monotonic() - began
  assert 0.6 < waited < 1.9 if ends else waited >= 2 + peers.BEAT
