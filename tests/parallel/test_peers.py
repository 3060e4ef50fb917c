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
  time.sleep(3)
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

folder, seconds, peers.PATIENCE = sys.argv[1], *map(float, sys.argv[2:])
other = peers.Peers(folder, 7, 1, 2, 100)
other._folder.mkdir()
other._write("its disk is full")
with peers.Peers(folder, 7, 0, 2, 100) as me:
  time.sleep(seconds)
  print("said what was wrong here")
  me.leave("a reason of its own")
  began = time.monotonic()
  me.wait_for_others()
  print("waited" if time.monotonic() - began > 30 else "did not wait")
"""


def run_with_one_that_ended(folder, seconds, patience):
  numbers = str(seconds), str(patience)
  return subprocess.run(
    [sys.executable, "-c", ENDS, str(folder), *numbers],
    env=environment(), capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_one_that_ends_by_itself_is_left_to_say_why(tmp_path):
  """Another may have said why a moment before, as of a save that failed."""
  done = run_with_one_that_ended(tmp_path, 1.5, 60)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "said what was wrong here\ndid not wait\n"


def test_one_that_does_not_end_is_ended(tmp_path):
  done = run_with_one_that_ended(tmp_path, 60, 1)
  assert (done.returncode, done.stdout) == (EXIT_PEER_LOST, "")
  assert "ended: its disk is full. Start all again" in done.stderr


def two(folder):
  leader, other = (Peers(folder, 7, i, 2, 100) for i in range(2))
  leader._folder.mkdir()
  other._write(None)
  return leader, other


def test_the_leader_waits_for_the_others(tmp_path, monkeypatch):
  """When it ends, JAX aborts them: they may be about to say why."""
  monkeypatch.setattr(peers, "PATIENCE", 60.0)
  leader, other = two(tmp_path)
  leader.leave("a reason")
  began = time.monotonic()
  thread = threading.Timer(0.7, other.leave, ["a reason"])
  thread.start()
  leader.wait_for_others()
  thread.join(0)
  assert not thread.is_alive() and time.monotonic() - began < 60


def test_the_leader_does_not_wait_for_ever(tmp_path, monkeypatch):
  monkeypatch.setattr(peers, "PATIENCE", 0.5)
  leader, _ = two(tmp_path)
  leader.leave("a reason")
  began = time.monotonic()
  leader.wait_for_others()
  assert time.monotonic() - began >= 0.5 + peers.BEAT


@pytest.mark.parametrize(
  "last, said",
  [("its disk is full", "ended: its disk is full"), (None, "is dead"),
   ("", None)],
)  # fmt: skip
def test_a_last_word_between_two_looks(tmp_path, monkeypatch, last, said):
  """Read, then dead: what it wrote in between counts."""
  leader, other = two(tmp_path)

  def dead(found):
    if last:
      other._write(last)
    elif last is not None:
      other._path(1).unlink(missing_ok=True)  # it left as it should
    return True

  monkeypatch.setattr(peers, "_is_dead", dead)
  lost = leader._lost()
  assert (lost is None) if said is None else lost.endswith(said)
  if last:
    assert leader._lost(patience=60.0) is None


def test_a_machine_that_slept_is_no_silence(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
  silence = peers._Silence()
  for later, touched, heard in [
    (0.25, 1.0, 0.0), (0.25, 1.0, 0.25), (1000.0, 1.0, 5.25),
    (0.5, 1.0, 5.75), (0.25, 2.0, 0.0), (0.25, 2.0, 0.25),
  ]:  # fmt: skip
    now[0] += later
    assert silence.seconds(touched) == heard


def test_an_error_is_said_while_it_looks_for_a_lost_process(tmp_path, capfd):
  leader, other = two(tmp_path)
  other._path(1).unlink()  # it left as it should
  leader._lost_after = 2
  assert leader.find_lost(ValueError("two\nlines")) is None
  said = "process 0 of 2: ValueError: two lines; looking whether another"
  assert said in capfd.readouterr().err


THREE = """
import sys, time
from moejax.parallel import peers

folder, index, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
peers.PATIENCE = 3.0
with peers.Peers(folder, 7, index, 3, 100) as me:
  while len(list(me._folder.glob("*.json"))) < 3:
    time.sleep(0.05)
  time.sleep(1)
  if index == 1:
    if how == "ends":
      me.leave("its disk is full")
    peers.os._exit(2)
  if index == 0:  # a collective that broke
    me.stop_for(me.find_lost(ValueError("broken")))
  time.sleep(60)
"""


@pytest.mark.parametrize(
  "how, said", [("ends", "ended: its disk is full"), ("dies", "is dead")]
)
def test_all_name_the_one_that_began_it(tmp_path, how, said):
  """And not process 0, which ended because of it."""
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", THREE, str(tmp_path), str(index), how],
      env=environment(), stderr=subprocess.PIPE, text=True,
    )
    for index in range(3)
  ]  # fmt: skip
  processes[1].communicate(timeout=60)
  for index in (0, 2):
    _, error = processes[index].communicate(timeout=60)
    assert processes[index].returncode == EXIT_PEER_LOST
    assert f"of 3 stops: process 1 (pid {processes[1].pid} on " in error
    assert f"{said}. Start all again" in error


def test_one_that_followed_another_is_not_blamed(tmp_path):
  leader, other = two(tmp_path)
  other.leave("process 5 (pid 1 on there) is dead", follows=True)
  assert leader._lost() == "process 5 (pid 1 on there) is dead"
