# SPDX-License-Identifier: Apache-2.0
"""Where the time went, with every second in one place."""

import json

import pytest

from moejax import goodput
from moejax.metrics import RunLog

ROW = {
  "seconds": 2.0, "input_wait": 0.25, "evaluation": 0.0, "checkpoint": 0.5
}  # fmt: skip


def launch(folder, from_step, began, steps, setup=3.0, compiling=5.0):
  """A launch whose steps take two seconds each; returns when it ended."""
  goodput.record_launch(folder, from_step, began, setup, compiling)
  now = began + setup + compiling
  with RunLog(folder, from_step) as log:
    for step in range(from_step + 1, from_step + steps + 1):
      now += ROW["seconds"]
      log.timing(step, ROW | {"wall_time": now})
  return now


def test_every_second_is_in_one_place(tmp_path):
  end = launch(tmp_path, 0, 1000.0, steps=10)
  end = launch(tmp_path, 6, end + 30, steps=4)  # four steps were not saved
  launch(tmp_path, 10, end + 100, steps=2)
  found = goodput.of_run(tmp_path)
  assert found.launches == 3 and found.redone_steps == 4
  assert found.total == 3 * 8 + 2 * 16 + 130
  assert found.parts == pytest.approx({
    "training steps": 12 * 1.25, "skipped steps": 0.0,
    "waiting for data": 12 * 0.25,
    "evaluation": 0.0, "checkpoints": 12 * 0.5, "start-up": 9.0,
    "compiling": 15.0, "steps done again": 8.0, "not running": 130.0,
    "other": 0.0,
  })  # fmt: skip
  assert found.share == pytest.approx(15 / found.total)
  assert found.describe().startswith("goodput 8% of 3 min 06 s in 3 launches:")


def test_a_launch_that_died_before_its_first_step(tmp_path):
  launch(tmp_path, 0, 1000.0, steps=2)
  goodput.record_launch(tmp_path, 2, 1020.0, 3.0, 5.0)
  launch(tmp_path, 2, 1040.0, steps=1)
  found = goodput.of_run(tmp_path)
  assert found.parts["not running"] == pytest.approx(8.0 + 12.0)
  assert sum(found.parts.values()) == pytest.approx(found.total)


def test_lines_of_another_run_before_this_one_do_not_count(tmp_path):
  """A branch has the logs of what it goes on from."""
  with RunLog(tmp_path, 0) as log:
    for step in range(1, 5):
      log.timing(step, ROW | {"wall_time": 100.0 + step})
  launch(tmp_path, 3, 1000.0, steps=1)
  found = goodput.of_run(tmp_path)
  assert found.redone_steps == 0 and found.total == 10.0
  assert found.parts["training steps"] == 1.25


def test_a_branch_has_done_nothing_in_vain_before_it_began(tmp_path):
  """Lines that it took over are older than its first launch."""
  timing = [
    {"step": step, "wall_time": 100.0 + step, "seconds": 1.0}
    for step in range(1, 41)
  ] + [{"step": step, "wall_time": 5000.0 + step, "seconds": 2.0}
       for step in (11, 12, 13)]  # fmt: skip
  goodput.record_launch(tmp_path, 10, 5000.0, 3.0, 5.0)
  text = "".join(json.dumps(row) + "\n" for row in timing)
  (tmp_path / "timing.jsonl").write_text(text)
  goodput.record_launch(tmp_path, 10, 6000.0, 3.0, 5.0)
  last = json.loads((tmp_path / "launches.jsonl").read_text().splitlines()[-1])
  assert last["redone_steps"] == 3 and last["redone"] == 6.0


def test_what_comes_after_the_last_step_and_steps_not_taken(
  tmp_path, monkeypatch
):
  """An evaluation and a save at the end are no pause, and no lost time."""
  end = launch(tmp_path, 0, 1000.0, steps=4)
  monkeypatch.setattr(goodput.time, "time", lambda: end + 7)
  waits = {"input_wait": 0.0, "evaluation": 4.0, "checkpoint": 2.0}
  goodput.record_end(tmp_path, 4, waits)
  (tmp_path / "skipped.jsonl").write_text(
    '{"step": 2, "reason": 1, "rows": []}\n'
  )
  found = goodput.of_run(tmp_path)
  assert found.total == 8 + 8 + 7 and found.launches == 1
  assert found.parts["training steps"] == 3 * 1.25
  assert found.parts["skipped steps"] == 1.25
  assert found.parts["evaluation"] == 4.0
  assert found.parts["checkpoints"] == 4 * 0.5 + 2.0
  assert found.parts["other"] == pytest.approx(1.0)
  launch(tmp_path, 4, end + 17, steps=1)
  assert goodput.of_run(tmp_path).parts["not running"] == 10.0


def test_nothing_to_tell_yet(tmp_path):
  assert goodput.of_run(tmp_path) is None
  goodput.record_launch(tmp_path, 0, 1000.0, 3.0, 5.0)
  assert goodput.of_run(tmp_path) is None
