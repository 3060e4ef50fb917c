# SPDX-License-Identifier: Apache-2.0
"""Two processes of a run: what happens to one, all know."""

import signal

import pytest

from moejax.checkpoint import CheckpointReader
from tests.multi_process.test_training import finish, free_port, start
from tests.test_train import wait_for_step

pytestmark = pytest.mark.slow

TWO = ["--config.parallel.data=2", "--config.data.sources=text",
       "--config.data.weights=()"]  # fmt: skip


def test_sigterm_to_one_stops_all_at_one_step(place):
  processes = start(place, 2, "asked", *TWO)
  wait_for_step(place / "asked", 6, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  done = finish(processes)
  if [status for status, *_ in done] == [0, 0]:
    pytest.skip("it had just finished")
  assert [status for status, *_ in done] == [75, 75], done
  saved = CheckpointReader(place / "asked" / "checkpoints").latest()
  assert f"stopped at step {saved}, saved" in done[0][1]  # which alone prints


def test_a_save_that_one_cannot_write(place):
  """Its part of the arrays is beyond the size that its files may have."""
  port = free_port()
  limited = ("bash", "-c", 'ulimit -f 8; exec "$@"', "limited")
  options = [*TWO, "--config.parallel.data=1", "--config.parallel.fsdp=2"]
  processes = start(place, 2, "part", *options, port=port, indices=[0])
  processes += start(
    place, 2, "part", *options, port=port, indices=[1], before=limited
  )
  done = finish(processes)
  assert [status for status, *_ in done] == [2, 2], done
  for _, _, error in done:
    assert "saving step 5 to" in error
  assert CheckpointReader(place / "part" / "checkpoints").steps() == []
