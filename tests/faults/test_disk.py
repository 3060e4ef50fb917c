# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, folders that vanish or are taken, odd names."""

import json
import os
import shutil

import pytest

from moejax.checkpoint import CheckpointReader
from moejax.cli import parse_config
from moejax.train import train as train_here
from tests.faults import faulty
from tests.test_train import assert_same_run, digest, lines, train


def error_of(done):
  """The one line of it; threads of TensorStore may speak after that."""
  said = done.stderr.splitlines()
  (error,) = [line for line in said if line.startswith("moejax train: ")]
  return error


def test_full_disk(place, unbroken, small_disk):
  run = small_disk / "run"
  done = train(
    place,
    run,
    "--config.checkpoint.every=1",
    "--config.checkpoint.keep_last=99",
  )
  assert done.returncode == 2
  error = error_of(done)
  assert "saving step" in error and "No space left" in error
  assert "it needs about" in error and "are free on its disk" in error
  steps = CheckpointReader(run / "checkpoints").steps()
  assert steps == list(range(1, steps[-1] + 1))
  for step in steps[:-1]:
    shutil.rmtree(run / "checkpoints" / str(step))
  again = train(place, run)
  assert again.returncode == 0, again.stderr
  assert f"goes on at step {steps[-1]}" in again.stdout
  assert_same_run(run, unbroken)


def test_a_second_run_is_refused_and_the_first_goes_on(place, unbroken):
  words = "train --config=config.py --workdir=taken"
  done = train(place, "taken", *faulty.option(7, "start_again", words))
  assert done.returncode == 0, done.stderr
  second = json.loads((place / "second.json").read_text())
  assert second["status"] == 2
  assert "taken is in use by the run with pid" in second["error"]
  assert second["error"].count("\n") == 1
  assert_same_run(place / "taken", unbroken)


@pytest.mark.parametrize("when", ["remove", "remove_saved"])
def test_the_workdir_vanishes(place, unbroken, when):
  run = f"gone_{when}"
  done = train(place, run, *faulty.option(12, when, run))
  assert done.returncode == 2
  assert run in error_of(done)
  if when == "remove_saved":
    assert f"{run}, or its run.lock, was removed" in error_of(done)
  shutil.rmtree(place / run, ignore_errors=True)
  assert train(place, run).returncode == 0
  assert_same_run(place / run, unbroken)


def test_strays_among_the_checkpoints(place, unbroken):
  run = place / "strays"
  shutil.copytree(unbroken, run)
  folder = run / "checkpoints"
  for name in ("99", "12_old", "40.tmp"):
    (folder / name).mkdir()
  (folder / "7").write_text("a file")
  done = train(place, "strays")
  assert done.returncode == 0, done.stderr
  assert "already trained to step 40" in done.stdout
  assert done.stderr.count("ignoring what is no checkpoint") == 1
  for name in ("12_old", "40.tmp", "7"):
    assert name in done.stderr and (folder / name).exists()
  # As a killed save leaves it: this run's own to remove.
  assert "removing the unfinished checkpoint of step 99" in done.stderr


@pytest.fixture(scope="module")
def here(place):
  """As `unbroken`, by this process, which compiles otherwise."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    assert train_here(parse_config("config.py", []), "here", report=False) == 0
  return place / "here"


@pytest.mark.parametrize(
  "name", ["a b/ü run/", "./x/../dots", "link", "long" * 50, "-dash"]
)
def test_names_of_folders(place, here, name, monkeypatch):
  monkeypatch.chdir(place)
  if name == "link":
    os.mkdir("behind")
    os.symlink("behind", "link")
  config = parse_config("config.py", [])
  assert train_here(config, name, report=False) == 0
  assert lines(place / name) == lines(here)
  assert digest(place / name) == digest(here)
