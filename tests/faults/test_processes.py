# SPDX-License-Identifier: Apache-2.0
"""Two processes of a run: what happens to one, all know."""

import json
import signal

import pytest

from moejax.checkpoint import CheckpointReader
from tests.faults import faulty
from tests.multi_process.test_training import finish, free_port, start
from tests.test_train import wait_for_step

pytestmark = pytest.mark.slow

TWO = ["--config.parallel.data=2", "--config.data.sources=text",
       "--config.data.weights=()"]  # fmt: skip
# Gives NaN to each w that is the tenth of its document.
ROUTER = """
import jax.numpy as jnp
from moejax.routing import top_k


def broken(logits_TE, mask_T, *, k, token_T, position_T, rng=None):
  routing = top_k(logits_TE, mask_T, k=k)
  bad_T = (token_T == ord("w")) & (position_T == 9)
  weight_A = jnp.where(bad_T[routing.token_A], jnp.nan, routing.weight_A)
  return routing.replace(weight_A=weight_A)
"""


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
    assert "saving step 5 to" in error and "File too large; it" in error
  assert CheckpointReader(place / "part" / "checkpoints").steps() == []


@pytest.mark.parametrize("process", [0, 1])
def test_a_task_that_raises_on_one_of_them(place, process):
  """All save, and say so."""
  run = f"raised_{process}"
  fault = faulty.option(7, "raise_on", str(process))
  done = finish(start(place, 2, run, *TWO, *fault))
  assert [status for status, *_ in done] == [2, 2], done
  assert "task fault raised ValueError" in done[process][2]
  assert "a task raised on another process" in done[1 - process][2]
  assert CheckpointReader(place / run / "checkpoints").latest() == 7


def test_all_begin_with_weights_and_hear_of_any_ones_task(place, unbroken):
  """Of a run of one process, each reads what its own devices hold."""
  options = [
    f"--config.train.init_from={unbroken}", "--config.train.num_steps=15",
    *faulty.option(3, "raise_on", "1"), "--config.eval.task_errors=note",
  ]  # fmt: skip
  done = finish(start(place, 2, "begun", *TWO, *options))
  assert [status for status, *_ in done] == [0, 0], done
  said = "process 1: step 3: task fault raised ValueError"
  assert said in done[1][2] and "task fault" not in done[0][1]
  first = [
    json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for run in (place / "begun", unbroken)
  ]
  assert first[0]["loss/xent"] < 0.8 * first[1]["loss/xent"]


def test_rows_of_a_skipped_step_are_those_of_all(place):
  (place / "breaking.py").write_text(ROUTER)
  options = [
    "--config.model.moe.router=breaking.broken(k=2)", "--config.eval.every=0",
    "--config.stability.max_skipped=99", "--config.train.num_steps=16",
  ]  # fmt: skip
  found = {}
  for count in (1, 2):
    run = f"skipped_{count}"
    split = f"--config.parallel.data={count}"
    done = finish(start(place, count, run, *TWO, *options, split))
    assert all(status == 0 for status, *_ in done), done
    lines = (place / run / "skipped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found[count] = {row["step"]: row["rows"] for row in rows}
  assert found[1] and found[1] == found[2]
  assert all(len(rows) == 4 for rows in found[1].values())
