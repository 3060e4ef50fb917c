# SPDX-License-Identifier: Apache-2.0
"""A window of steps under the profiler, and windows that are not run."""

import pytest

from moejax.__main__ import main
from moejax.errors import ConfigError
from moejax.profiling import Profiler, ProfileWindow
from tests.small_run import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("profiling"))


@pytest.fixture
def launch(place, monkeypatch, capsys):
  """`launch(workdir, num_steps, window)` -> exit code, output, errors."""
  monkeypatch.chdir(place)

  def launched(workdir, num_steps, window):
    code = main([
      "train", "--config=config.py", f"--workdir={workdir}", "--no-report",
      f"--config.train.num_steps={num_steps}", f"--profile={window}",
      "--config.eval.every=0", "--config.optimizer.schedule.decay=0",
    ])  # fmt: skip
    return code, *capsys.readouterr()

  return launched


def recorded(folder):
  return list((folder / "profile").rglob("*.xplane.pb"))


def test_a_window_of_steps_is_profiled(place, launch):
  code, out, _ = launch("profiled", 8, "3:5")
  assert code == 0 and "profile: profiled/profile" in out
  (found,) = recorded(place / "profiled")
  assert found.stat().st_size > 10_000
  for bad in ("5:3", "x", "0:2", "7"):
    code, _, error = launch("profiled", 8, bad)
    assert code == 2 and f"--profile={bad}" in error
  # The same command goes on, though its window is done.
  code, out, _ = launch("profiled", 10, "3:5")
  assert code == 0 and "--profile=3:5 is of steps that are done" in out
  assert recorded(place / "profiled") == [found]


def test_a_window_that_is_never_run_is_refused(place, launch):
  code, _, error = launch("never", 6, "100:110")
  assert code == 2
  assert "--profile=100:110 begins after train.num_steps=6" in error
  assert not (place / "never").exists()
  code, out, _ = launch("never", 6, "5:9")
  assert code == 0 and "--profile=5:9 is cut to steps 5 to 6" in out
  assert recorded(place / "never")


def test_what_is_left_of_a_window(tmp_path, capsys):
  window = ProfileWindow(5, 9)
  assert window.left(0, 20, tmp_path) == window
  assert capsys.readouterr().out == ""
  assert window.left(6, 20, tmp_path) == ProfileWindow(7, 9)
  assert "is cut to steps 7 to 9: this launch runs" in capsys.readouterr().out
  for start, end in ((9, 20), (7, 7)):
    with pytest.raises(ConfigError, match=f"has done {start} of {end} steps"):
      window.left(start, end, tmp_path)
  (tmp_path / "profile").mkdir()
  assert window.left(9, 20, tmp_path) is None
  assert "nothing is recorded" in capsys.readouterr().out


def test_a_stop_before_the_window_is_said(tmp_path):
  profiler = Profiler(ProfileWindow(5, 9), tmp_path)
  profiler.before(4)
  assert profiler.after(4, None) == ""
  said = "profile: nothing recorded, the run stops before step 5"
  assert profiler.finish(4) == said
  profiler.before(5)
  said = profiler.finish(6)
  assert str(tmp_path / "profile") in said and "it ends at step 6" in said
  assert Profiler(None, tmp_path).finish(4) == ""
