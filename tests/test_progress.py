# SPDX-License-Identifier: Apache-2.0
"""Progress in files, pipes and (odd) terminals."""

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from moejax import progress
from moejax.progress import TrainProgress, format_count, format_seconds

SCRIPT = """
import sys, time
from moejax.progress import TrainProgress, progress_bar
with TrainProgress(40, 10) as p:
  p.message("hello [bold]x[/bold] \\x1b[31m red")
  for step in range(11, 41):
    p.update(step, loss=3.25, tokens_per_second=41234.0, learning_rate=3e-4)
    if step == 25:
      print("a plain print")
      time.sleep(0.3)
with progress_bar("tokenizing", 10) as bar:
  for _ in range(10):
    bar.advance()
with progress_bar("reading", None) as bar:
  bar.advance(1500)
"""
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**changes) -> dict[str, str]:
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  for name in (*progress.NOTEBOOK_VARIABLES, "COLUMNS", "LINES", "NO_COLOR"):
    env.pop(name, None)
  return {**env, **changes}


def run_in_terminal(columns: int, script: str = SCRIPT, **env) -> str:
  """What a script writes to a pseudo-terminal of this width."""
  main, child = pty.openpty()
  size = struct.pack("HHHH", 24, columns, 0, 0)
  fcntl.ioctl(child, termios.TIOCSWINSZ, size)
  process = subprocess.Popen(
    [sys.executable, "-c", script], stdin=child, stdout=child, stderr=child,
    env=environment(**{"TERM": "xterm-256color", **env}),
  )  # fmt: skip
  os.close(child)
  output = b""
  while True:
    try:
      chunk = os.read(main, 65536)
    except OSError:  # Linux's end of file of a pseudo-terminal
      break
    if not chunk:
      break
    output += chunk
  os.close(main)
  assert process.wait() == 0, output.decode()
  return output.decode()


def screen_lines(output: str) -> list[str]:
  return [line.rstrip() for line in re.split(r"[\r\n]+", ANSI.sub("", output))]


@pytest.mark.parametrize("columns", [120, 60, 20])
def test_terminal_gets_a_live_line_that_fits(columns):
  output = run_in_terminal(columns)
  assert "\x1b[2K" in output, "nothing was redrawn"
  assert output.rstrip().endswith("\x1b[?25h"), "the cursor stays hidden"
  lines = screen_lines(output)
  assert max(map(len, lines)) <= columns
  assert any("step 40/40" in line for line in lines)
  assert "a plain print" in lines
  assert "Traceback" not in output and "display is off" not in output
  last = [line for line in lines if "step 40/40" in line][-1]
  everything = "step 40/40  loss 3.2500  41.2k tokens/s  lr 3.00e-04"
  # Fields that do not fit are left out whole.
  expected = {
    120: "━" * 40 + "  " + everything, 60: everything, 20: "step 40/40"
  }  # fmt: skip
  assert last == expected[columns]
  if columns == 120:
    assert "hello [bold]x[/bold] \\x1b[31m red" in lines


@pytest.mark.parametrize(
  "columns, env",
  [(80, {"TERM": "dumb"}), (8, {}), (80, {"COLAB_RELEASE_TAG": "x"})],
)
def test_odd_terminals_and_notebook_shells_get_plain_lines(columns, env):
  output = run_in_terminal(columns, **env)
  assert "\x1b" not in output
  assert "step 12/40" in output and "step 40/40" in output
  assert "display is off" not in output


def test_terminal_without_a_size_works():
  output = run_in_terminal(0)
  assert "\x1b[2K" in output and "step 40/40" in output
  assert "display is off" not in output


def test_ascii_terminal_works():
  script = SCRIPT.replace("hello", "h\\u00e9llo \\u4e2d")
  output = run_in_terminal(80, script, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
  assert "step 40/40" in output and "Traceback" not in output


def test_pipe_gets_whole_lines():
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT], env=environment(TERM="xterm"),
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  lines = done.stdout.splitlines()
  assert lines[0] == "going on after step 10 of 40"
  assert lines[1] == "hello [bold]x[/bold] \\x1b[31m red"
  steps = [line.split()[1] for line in lines if line.startswith("step")]
  assert steps == ["11/40", "12/40", "13/40", "40/40"]
  assert lines[-2:] == ["tokenizing  10/10", "reading  1.5k"]
  assert "\x1b" not in done.stdout and done.stderr == ""


def test_reader_that_goes_away_does_not_end_the_run():
  script = """
import os, sys
from moejax.progress import TrainProgress
sys.stdin.read()
with TrainProgress(40, 0) as p:
  for step in range(1, 41):
    p.update(step, loss=3.25, tokens_per_second=41234.0)
sys.stderr.write("the run ended well")
sys.stderr.flush()
os._exit(0)
"""
  with subprocess.Popen(
    [sys.executable, "-c", script], env=environment(), text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  ) as process:  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read()
  assert process.returncode == 0
  assert errors.count("progress display is off: BrokenPipeError") == 1
  assert errors.endswith("the run ended well")


class Clock:
  now = 1000.0

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress, "time", clock)
  return clock


def test_plain_lines_come_at_growing_intervals(clock):
  out = io.StringIO()
  times = {}
  with TrainProgress(10_000, 0, out) as p:
    for step in range(1, 501):
      clock.now += 1.0
      p.update(step, loss=1.0, tokens_per_second=1.0)
      for line in out.getvalue().splitlines():
        times.setdefault(int(re.search(r"step +(\d+)/", line)[1]), step)
  shown = [int(m) for m in re.findall(r"step +(\d+)/10000", out.getvalue())]
  assert shown[:4] == [1, 2, 3, 8] and shown[-1] == 500
  gaps = [b - a for a, b in itertools.pairwise(shown[3:-1])]
  assert gaps == sorted(gaps) and gaps[0] <= 7 and gaps[-1] == 30
  assert all(step == when for step, when in times.items())


def test_last_step_is_shown_even_after_an_error(clock):
  out = io.StringIO()
  p = TrainProgress(100, 0, out)
  p.__enter__()
  for step in range(1, 8):
    p.update(step, loss=float("nan"), tokens_per_second=float("nan"))
  p.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
  assert out.getvalue().splitlines()[-1] == "step   7/100  loss nan"


def test_last_line_does_not_wait_for_the_end_of_the_program(clock):
  out = io.StringIO()
  with TrainProgress(10, 0, out) as p:
    for step in range(1, 11):
      p.update(step, loss=1.0, tokens_per_second=1.0)
    assert "step 10/10" in out.getvalue()


def test_time_left_leaves_out_compilation(clock):
  out = io.StringIO()
  with TrainProgress(100, 50, out) as p:
    clock.now += 500.0  # compiling
    p.update(51, loss=1.0, tokens_per_second=5.0)
    clock.now += 2.0
    p.update(52, loss=1.0, tokens_per_second=5.0)
  first, second = out.getvalue().splitlines()[1:]
  assert "left" not in first
  assert second.endswith("1 min 36 s left")


def test_update_is_cheap():
  with TrainProgress(10_000, 0, io.StringIO()) as p:
    start = time.perf_counter()
    for step in range(1, 5001):
      p.update(step, loss=1.0, tokens_per_second=1.0, learning_rate=1e-3)
    assert (time.perf_counter() - start) / 5000 < 2e-4


@pytest.mark.parametrize(
  "number, text",
  [(0, "0"), (999, "999"), (1234567, "1.23M"), (999.9e3, "1M"), (1000, "1k"),
   (6.92e9, "6.92G"), (5.13e12, "5.13T"), (0.25, "0.25"),
   (float("nan"), "nan")],
)  # fmt: skip
def test_counts_have_three_digits(number, text):
  assert format_count(number) == text


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"),
   (90000, "1 d 01 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
  assert format_seconds(seconds) == text


@pytest.mark.parametrize(
  "number, text",
  [
    (512, "0.5 KiB"),
    (999.4 * 2**20, "999 MiB"),
    (1020 * 2**20, "0.996 GiB"),  # not 1.02e+03 MiB
    (1.5 * 2**30, "1.5 GiB"),
    (3 * 2**40, "3 TiB"),
  ],
)
def test_bytes_have_three_digits(number, text):
  assert progress.format_bytes(number) == text


def test_what_was_done_before_took_no_time(capsys, clock):
  with progress.progress_bar("steps", 1000, done=500) as bar:
    bar.advance(50)
    clock.now += 0.02
    bar.advance(50)
  lines = capsys.readouterr().out.splitlines()
  assert lines == ["steps  550/1000", "steps  600/1000  0 s left"]
