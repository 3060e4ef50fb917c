# SPDX-License-Identifier: Apache-2.0
"""A router's file that is edited between the runs of a sweep."""

import json

import pytest

from moejax.__main__ import main
from moejax.config import Config
from moejax.errors import ConfigError
from moejax.metrics import encode_line
from moejax.sweep.sources import changed_files
from moejax.sweep.spec import PlannedRun
from moejax.sweep.state import FAILED, RunState, check_routers, write_state
from tests.small_run import make_place, moejax

SWEEP = """
from moejax.sweep import Sweep

def get_sweep():
  return Sweep(
    config="config.py", seeds=(0,),
    points={
      "own": {"model.moe.router": "own_router.route(k=2)"},
      "top_k": {"model.moe.router": "top_k(k=2)"},
    },
    common={"train.num_steps": 20, "eval.sample_tokens": 0},
  )
"""
ROUTER = """
from moejax.routing import top_k

def route(logits_TE, mask_T, *, k, rng=None):
  return top_k(logits_TE, mask_T, k=k)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("own"))
  (place / "sweep.py").write_text(SWEEP)
  (place / "own_router.py").write_text(ROUTER)
  done = moejax(place, "sweep", "--sweep=sweep.py", "--workdir=w")
  assert done.returncode == 0, done.stdout + done.stderr
  return place


@pytest.fixture
def call(place, monkeypatch, capsys):
  """Calls `moejax sweep`; returns its exit code, and what it printed."""
  monkeypatch.chdir(place)

  def run(*options):
    code = main(["sweep", "--sweep=sweep.py", "--workdir=w", *options])
    return code, capsys.readouterr()

  return run


@pytest.fixture
def edited(place):
  (place / "own_router.py").write_text(ROUTER.replace("k=k)", "k=k + 0)"))
  yield place
  (place / "own_router.py").write_text(ROUTER)


def state_file(place, run):
  return place / "w" / run / "sweep_state.json"


def test_what_is_recorded(place):
  own = json.loads(state_file(place, "own/seed_0").read_text())
  assert list(own["router_files"]) == ["own_router"]
  top_k = json.loads(state_file(place, "top_k/seed_0").read_text())
  assert top_k["router_files"] == {}  # moejax's own version is in config.json


def test_no_mean_over_two_routers(edited, call):
  code, said = call("--seeds=0,1")
  assert code == 2
  workdir, file = edited / "w", edited / "own_router.py"
  assert f"own/seed_0 in {workdir}: made with another {file} than" in said.err
  assert "remove that folder" in said.err and said.err.count("\n") == 1
  assert not (workdir / "own" / "seed_1").exists()


@pytest.mark.parametrize("options", [[], ["--compare"], ["--seeds=0"]])
def test_what_is_done_is_compared_with_a_note(edited, call, options):
  code, said = call(*options)
  assert code == 0
  assert "note: own/seed_0: made with another" in said.out


def test_a_dry_run_tells(edited, call):
  code, said = call("--dry-run", "--seeds=0,1")
  assert code == 2 and "made with another" in said.err
  assert "own/seed_0                   other router file " in said.out
  assert "top_k/seed_0                 done " in said.out


def test_what_was_made_with_nothing_is_made_again(place):
  """A router that failed before its first step is corrected and repeated."""
  run = PlannedRun("own", 0, Config())
  old = RunState(FAILED, "", 1.0, {"own_router": "0" * 64})
  write_state(place / "fresh" / run.name, old)
  assert check_routers(place / "fresh", [run], [run]) == []
  log = place / "fresh" / run.name / "metrics.jsonl"
  log.write_bytes(encode_line(1, {"loss/xent": 1.0}))
  with pytest.raises(ConfigError, match="own/seed_0 .* made with another"):
    check_routers(place / "fresh", [run], [run])


def test_a_file_that_is_gone_has_changed_too(place):
  recorded = {"own_router": "0" * 64, "gone": "1" * 64}
  assert changed_files(recorded)[1:] == ["gone"]


def test_states_of_before_are_read(edited, call):
  """Runs of versions that did not record the file are taken as they are."""
  file = state_file(edited, "own/seed_0")
  before = file.read_text()
  old = json.loads(before)
  del old["router_files"]
  file.write_text(json.dumps(old))
  code, said = call("--compare")
  file.write_text(before)
  assert code == 0 and "made with another" not in said.out
