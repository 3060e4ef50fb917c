# SPDX-License-Identifier: Apache-2.0
"""Logs: exact resumption, strict JSON, and disks that fail."""

import json
import logging
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from moejax import metrics
from moejax.errors import DataError
from moejax.metrics import RunLog, read_jsonl


def values(step: int) -> dict:
  rng = np.random.default_rng(step)
  return {
    "loss/total": np.float32(rng.normal()),
    "grad_norm": np.float32(rng.lognormal()),
    "tokens": 4096 * step,
  }


def write_steps(log: RunLog, first: int, last: int) -> None:
  for step in range(first, last + 1):
    log.step(step, values(step))
    log.timing(step, {"seconds": 0.25, "wall_time": 1.7e9 + step})
    if step % 5 == 0:
      log.evaluation(step, {"validation/xent": np.float32(1 / step)})
      log.load(step, np.full((2, 4), 0.25, np.float32))
      log.sample(step, "def", f"line\nbreak {step}")
      log.sample(step, "def", "second sample of this step")
      log.skipped(step, 1, np.array([[0, step], [1, 7]]))


def contents(folder) -> dict[str, bytes]:
  return {name: (folder / name).read_bytes() for name in metrics.FILES}


@pytest.fixture
def unbroken(tmp_path):
  with RunLog(tmp_path / "unbroken", 0) as log:
    write_steps(log, 1, 20)
  return contents(tmp_path / "unbroken")


@pytest.mark.parametrize("killed_at", [12, 15, 20])
def test_resumed_run_has_the_bytes_of_an_unbroken_one(
  tmp_path, unbroken, killed_at
):
  with RunLog(tmp_path, 0) as log:
    write_steps(log, 1, killed_at)
  with RunLog(tmp_path, 10) as log:
    write_steps(log, 11, 20)
  assert contents(tmp_path) == unbroken


@pytest.mark.parametrize(
  "torn", [b"{", b'{"step": 11, "lo', b'{"step": 9}', b"\0"]
)
def test_torn_last_line_is_cut_in_every_file(tmp_path, unbroken, torn):
  with RunLog(tmp_path, 0) as log:
    write_steps(log, 1, 12)
  for name in metrics.FILES:
    with open(tmp_path / name, "ab") as f:
      f.write(torn)
  with RunLog(tmp_path, 10) as log:
    write_steps(log, 11, 20)
  assert contents(tmp_path) == unbroken


def test_killed_process_loses_no_finished_line(tmp_path, unbroken):
  code = (
    "import os, runpy\n"
    f"test = runpy.run_path({__file__!r})\n"
    f"test['write_steps'](test['RunLog']({str(tmp_path)!r}, 0), 1, 14)\n"
    f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
  )
  done = subprocess.run([sys.executable, "-c", code])
  assert done.returncode == -signal.SIGKILL
  assert read_jsonl(tmp_path / metrics.METRICS)[-1]["step"] == 14
  with RunLog(tmp_path, 14) as log:
    write_steps(log, 15, 20)
  assert contents(tmp_path) == unbroken


def test_fresh_start_keeps_nothing_of_an_older_run(tmp_path, unbroken):
  with RunLog(tmp_path, 0) as log:
    log.evaluation(0, {"validation/xent": 6.0})
    write_steps(log, 1, 3)
  with RunLog(tmp_path, 0) as log:
    write_steps(log, 1, 20)
  assert contents(tmp_path) == unbroken


def test_missing_lines_before_the_checkpoint_are_reported(tmp_path, caplog):
  with RunLog(tmp_path, 0) as log:
    write_steps(log, 1, 7)
  with RunLog(tmp_path, 7):
    assert not caplog.records
  with RunLog(tmp_path, 10):
    assert "ends at step 7 but the checkpoint is of step 10" in caplog.text


def test_lines_are_strict_json_with_shortest_float32(tmp_path):
  third = np.float32(1) / np.float32(3)
  with RunLog(tmp_path, 0) as log:
    log.step(1, {
      "b": third, "a": 0.1, "nan": float("nan"), "up": np.inf, "down": -np.inf,
      "big": 1e300, "int": np.int32(7), "zero_d": np.array(2.5), "tiny": 1e-9,
    })  # fmt: skip
  line = (tmp_path / metrics.METRICS).read_text()
  assert line.startswith('{"step": 1, "a": 0.1, "b": 0.33333334, ')

  def refuse(name):
    raise AssertionError(name)

  row = json.loads(line, parse_constant=refuse)
  assert row["nan"] == "NaN" and row["up"] == row["big"] == "Infinity"
  assert np.float32(row["b"]) == third and row["int"] == 7
  back = read_jsonl(tmp_path / metrics.METRICS)[0]
  assert np.isnan(back["nan"]) and back["down"] == -np.inf
  assert back["zero_d"] == 2.5 and np.float32(back["tiny"]) == np.float32(1e-9)


def test_timing_keeps_the_precision_of_clock_times(tmp_path):
  now = 1763766000.123456
  with RunLog(tmp_path, 0) as log:
    log.timing(1, {"wall_time": now})
  assert read_jsonl(tmp_path / metrics.TIMING)[0]["wall_time"] == now


TEXTS = [
  "NaN", "中文 \u2028 \x85 next", "\ud800 lone", 'quote " \\', "\x1b[31m\0", ""
]  # fmt: skip


def test_samples_come_back_unchanged(tmp_path):
  with RunLog(tmp_path, 0) as log:
    for text in TEXTS:
      log.sample(1, text, text)
  rows = read_jsonl(tmp_path / metrics.SAMPLES)
  assert [row["text"] for row in rows] == TEXTS
  assert [row["prompt"] for row in rows] == TEXTS
  with RunLog(tmp_path, 1):
    pass
  assert len(read_jsonl(tmp_path / metrics.SAMPLES)) == len(TEXTS)


def test_load_round_trips(tmp_path):
  load_LE = np.random.default_rng(0).dirichlet(np.ones(8), 3).astype(np.float32)
  with RunLog(tmp_path, 0) as log:
    log.load(4, load_LE)
    with pytest.raises(ValueError, match="layers, experts"):
      log.load(5, load_LE[0])
  (row,) = read_jsonl(tmp_path / metrics.LOAD)
  assert row["step"] == 4
  np.testing.assert_array_equal(np.array(row["load"], np.float32), load_LE)


def test_steps_must_go_up(tmp_path):
  with RunLog(tmp_path, 0) as log:
    log.step(1, {"loss/total": 1.0})
    with pytest.raises(ValueError, match="step 1 is not after 1"):
      log.step(1, {"loss/total": 1.0})
    with pytest.raises(ValueError, match="'step' is not a metric's name"):
      log.evaluation(1, {"step": 1})
  with RunLog(tmp_path, 3) as log:
    with pytest.raises(ValueError, match="not after 3"):
      log.step(3, {"loss/total": 1.0})


def test_reader_leaves_out_damaged_lines(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n{"step": 4')
  assert [row["step"] for row in read_jsonl(path)] == [1, 3]
  assert "line 2 is damaged" in caplog.text
  with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
    read_jsonl(tmp_path / "none.jsonl")


def test_full_disk_is_one_warning_and_loses_no_line(tmp_path, unbroken, caplog):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    with RunLog(tmp_path, 0) as log:
      write_steps(log, 1, 4)
      # Room for a part of the next line: what a filling disk does.
      size = (tmp_path / metrics.METRICS).stat().st_size
      resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
      write_steps(log, 5, 15)
      log.flush()
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
      assert (tmp_path / metrics.METRICS).stat().st_size == size
      write_steps(log, 16, 20)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old_action)
  warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(warnings) == 1 and "training goes on" in warnings[0].getMessage()
  assert contents(tmp_path) == unbroken


def test_pending_lines_have_a_bound(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(metrics, "MAX_PENDING", 500)
  (tmp_path / metrics.METRICS).mkdir()  # opening it for writing fails
  with RunLog(tmp_path, 0) as log:
    for step in range(1, 40):
      log.step(step, values(step))
    assert len(log._files[metrics.METRICS]._pending) <= 500
  assert "dropped" in caplog.text


def events(folder) -> list:
  _, event_pb2, _ = metrics.event_file._import_tensorboardx()
  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def test_event_files_hold_all_scalars_and_purge_on_resume(tmp_path):
  with RunLog(tmp_path, 0) as log:
    write_steps(log, 1, 10)
  with RunLog(tmp_path, 5) as log:
    write_steps(log, 6, 7)
  found = events(tmp_path / "events")
  starts = [e.step for e in found if e.HasField("session_log")]
  assert starts == [0, 6]
  scalars = [
    (e.step, v.tag, v.simple_value) for e in found for v in e.summary.value
  ]
  steps = [s for s, tag, _ in scalars if tag == "loss/total"]
  assert steps == [*range(1, 11), 6, 7]
  assert (5, "validation/xent", np.float32(0.2)) in scalars
  assert (3, "timing/seconds", 0.25) in scalars


def test_opening_logs_does_not_import_torch(tmp_path):
  code = (
    "import sys; from moejax.metrics import RunLog\n"
    f"RunLog({str(tmp_path)!r}, 0).close()\n"
    "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
