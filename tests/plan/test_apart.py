# SPDX-License-Identifier: Apache-2.0
"""What a process of its own gives back, and how it may end."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.errors import ConfigError
from moejax.plan.apart import Crashed, run_apart
from moejax.runlock import process_start
from tests.small_run import environment


def test_results_and_errors_come_back():
  assert run_apart(math.gcd, 12, 18) == 6
  with pytest.raises(ConfigError, match="no such thing"):
    run_apart(_refuse, "no such thing")


def test_an_abort_is_not_ours():
  with pytest.raises(Crashed):
    run_apart(os.abort)


def test_it_does_not_outlive_who_asked(tmp_path):
  code = (
    "from moejax.plan.apart import run_apart\n"
    "from tests.plan.test_apart import note_and_sleep\n"
    f"run_apart(note_and_sleep, {str(tmp_path / 'pid')!r})"
  )
  parent = subprocess.Popen([sys.executable, "-c", code], env=environment())
  while not (tmp_path / "pid").exists():
    assert parent.poll() is None
    time.sleep(0.05)
  parent.kill()
  parent.wait()
  child = int((tmp_path / "pid").read_text())
  end = time.monotonic() + 20
  while process_start(child) is not None and time.monotonic() < end:
    time.sleep(0.05)
  assert process_start(child) is None


def note_and_sleep(path):
  Path(path + ".part").write_text(str(os.getpid()))
  os.replace(path + ".part", path)
  time.sleep(60)


def _refuse(message):
  raise ConfigError(message)
