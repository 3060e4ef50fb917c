# SPDX-License-Identifier: Apache-2.0
"""What a process says of the others when a library ends it."""

import signal
import subprocess
import sys

import pytest

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
