# SPDX-License-Identifier: Apache-2.0
"""`moejax sweep` as a user runs it: killed, failing, as an array of jobs."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from moejax.__main__ import main
from moejax.errors import ConfigError
from moejax.metrics import encode_line, last_step
from moejax.runlock import RunLock
from moejax.sweep.check import check_points
from moejax.sweep.spec import load_sweep, plan_runs
from moejax.sweep.state import DONE, RunState, how_far, write_state
from tests.small_run import command, environment, make_place, moejax

SWEEP = """
'''Two routers'''
from moejax.sweep import Sweep

def get_sweep(arg=""):
  points = {
    "two": {"model.moe.router": "top_k(k=2)"},
    "one": {"model.moe.router": "top_k(k=1)"},
  }
  if arg:
    router = arg if "(" in arg else f"odd.{arg}(k=1)"
    points["odd"] = {"model.moe.router": router}
  return Sweep(
    config="config.py", points=points,
    common={"train.num_steps": 20, "eval.sample_tokens": 0},
  )
"""
# Routers that go wrong in training, not where points are checked.
ODD = """
import multiprocessing, os, signal
from moejax.routing import top_k

def in_training(say):
  if multiprocessing.current_process().name == "moejax-sweep":
    say()

def raising(logits_TE, mask_T, *, k, rng=None):
  if os.path.exists("broken"):
    in_training(lambda: [][1])
  return top_k(logits_TE, mask_T, k=k)

def slipping(logits_TE, mask_T, *, k, rng=None):
  return [].tokens

def dying(logits_TE, mask_T, *, k, rng=None):
  in_training(lambda: os.kill(os.getpid(), signal.SIGKILL))
  return top_k(logits_TE, mask_T, k=k)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("sweep"))
  (place / "sweep.py").write_text(SWEEP)
  (place / "odd.py").write_text(ODD)
  return place


def sweep(place, workdir, *options, file="sweep.py"):
  return moejax(
    place, "sweep", f"--sweep={file}", f"--workdir={workdir}", *options
  )


@pytest.fixture(scope="module")
def finished(place):
  done = sweep(place, "finished")
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def state(place, run):
  return json.loads((place / run / "sweep_state.json").read_text())


def validation(place, run):
  return (place / run / "eval.jsonl").read_text()


RUNS = ("two/seed_0", "one/seed_0", "two/seed_1", "one/seed_1")


def test_it_runs_all_and_compares(place, finished):
  for run in RUNS:
    assert state(place, f"finished/{run}")["state"] == "done"
    assert last_step(place / "finished" / run / "metrics.jsonl") == 20
    assert re.search(rf"^{run}: done in ", finished, re.MULTILINE)
  numbers = json.loads((place / "finished" / "comparison.json").read_text())
  for name, point in numbers["points"].items():
    for seed, loss in point["final_loss_by_seed"].items():
      rows = validation(place, f"finished/{name}/seed_{seed}").splitlines()
      assert loss == pytest.approx(json.loads(rows[-1])["validation/xent"])
  two, one = (numbers["points"][n] for n in ("two", "one"))
  paired = [
    one["final_loss_by_seed"][s] - two["final_loss_by_seed"][s] for s in "01"
  ]
  assert one["difference"] == pytest.approx(sum(paired) / 2)
  assert one["router/experts_per_token"] == 1
  table = (place / "finished" / "comparison.md").read_text()
  assert table.count("\n") == 6 and "| two | " in table
  page = (place / "finished" / "index.html").read_text()
  assert 'data-point="one"' in page and "loss-curves-curve-one" in page
  assert "http" not in page.replace("http://www.w3.org", "")


def test_what_is_done_is_skipped(place, finished):
  before = [(place / "finished" / r / "metrics.jsonl").stat() for r in RUNS]
  again = sweep(place, "finished")
  assert again.returncode == 0
  assert again.stdout.startswith("all 4 runs are done")
  after = [(place / "finished" / r / "metrics.jsonl").stat() for r in RUNS]
  assert before == after


def test_a_dry_run_lists_and_does_nothing(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  args = ["sweep", "--sweep=sweep.py", "--workdir=dry", "--dry-run"]
  assert main([*args, "--seeds=4,5,6", "--points=one"]) == 0
  said = capsys.readouterr().out
  assert "1 points, 3 runs" in said
  assert said.count("model.moe.router=top_k(k=1), seed=") == 3
  assert not (place / "dry").exists()


def test_a_dry_run_says_what_keeps_the_real_one(
  place, finished, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  args = ["sweep", "--sweep=sweep.py", "--workdir=finished", "--dry-run"]
  assert main(args) == 0
  assert len(re.findall(r"two/seed_\d +done ", capsys.readouterr().out)) == 2
  assert main([*args, "--config.optimizer.eps=0.1"]) == 2
  said = capsys.readouterr()
  assert said.out.count(" other settings ") == 4 and " done " not in said.out
  assert "has a run of other settings" in said.err
  args[2] = "--workdir=not_yet"
  assert main([*args, "--config.data.seq_len=64"]) == 0
  assert "note: no token store" in capsys.readouterr().out


def test_a_point_alone_leaves_the_others_on_the_page(
  place, finished, monkeypatch, capsys
):
  """`--points` and `--seeds` say what is run; two stays the baseline."""
  monkeypatch.chdir(place)
  file = place / "finished" / "comparison.json"
  before = file.read_text()
  args = ["sweep", "--sweep=sweep.py", "--workdir=finished", "--seeds=1"]
  assert main([*args, "--points=one"]) == 0
  assert "all 1 runs are done" in capsys.readouterr().out
  assert file.read_text() == before
  assert json.loads(before)["reference"] == "two"


def test_a_run_on_the_way_says_how_far_it_is(place, tmp_path, monkeypatch):
  monkeypatch.chdir(place)
  run = plan_runs(load_sweep("sweep.py"))[0]
  assert how_far(tmp_path, run) == "waiting"
  folder = tmp_path / run.name
  folder.mkdir(parents=True)
  (folder / "metrics.jsonl").write_bytes(encode_line(7, {"loss/xent": 1.0}))
  assert how_far(tmp_path, run) == "stopped at 7/20"
  with RunLock(folder):
    assert how_far(tmp_path, run) == "at work, 7/20"
  assert how_far(tmp_path, run) == "stopped at 7/20"
  write_state(folder, RunState(DONE))
  assert how_far(tmp_path, run) == "done"
  for skipped, said in ((1.0, "done"), (0.0, "done, its loss is not finite")):
    row = encode_line(20, {"loss/xent": float("nan"), "skipped": skipped})
    (folder / "metrics.jsonl").write_bytes(row)
    assert how_far(tmp_path, run) == said


def test_a_slip_in_a_router_is_one_line_and_debug_shows_all(
  place, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  args = ["sweep", "--sweep=sweep.py:slipping", "--workdir=bad"]
  line = 1 + ODD.splitlines().index("  return [].tokens")
  assert main(args) == 2
  assert f"(odd.py:{line}) raised AttributeError" in capsys.readouterr().err
  with pytest.raises(ConfigError) as caught:
    main([*args, "--debug"])
  assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(place, finished):
  """SIGKILL of the command; its workers save and end by themselves."""
  process = subprocess.Popen(
    command("sweep", "--sweep=sweep.py", "--workdir=killed", "--jobs=2"),
    cwd=place, env=environment(), stdout=subprocess.DEVNULL,
  )  # fmt: skip
  log = place / "killed" / "two" / "seed_0" / "metrics.jsonl"
  wait_until(lambda: last_step(log) >= 3)
  process.kill()
  process.wait()
  locks = [place / "killed" / run / "run.lock" for run in RUNS]
  # The workers let go of their runs.
  wait_until(lambda: not any(x.exists() and x.read_text() for x in locks))
  time.sleep(1.0)  # and tells the command, which is not there
  again = sweep(place, "killed", "--jobs=2")
  assert again.returncode == 0, again.stdout + again.stderr
  for run in RUNS:
    assert validation(place, f"killed/{run}") == validation(
      place, f"finished/{run}"
    )
    assert "Traceback" not in (place / "killed" / run / "log.txt").read_text()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(place, finished):
  process = subprocess.Popen(
    command("sweep", "--sweep=sweep.py", "--workdir=stopped"),
    cwd=place, env=environment(), stdout=subprocess.PIPE, text=True,
    start_new_session=True,
  )  # fmt: skip
  log = place / "stopped" / "two" / "seed_0" / "metrics.jsonl"
  wait_until(lambda: last_step(log) >= 3)
  os.killpg(process.pid, signal.SIGINT)  # as a terminal does
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 75, out
  steps = last_step(log)
  assert f"two/seed_0: stopped at {steps}/20, saved" in out
  assert "the same command goes on, with --compare it draws" in out
  assert not (place / "stopped" / "one").exists()
  assert sweep(place, "stopped").returncode == 0
  assert 3 <= steps < 20
  for run in RUNS:
    assert validation(place, f"stopped/{run}") == validation(
      place, f"finished/{run}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  "router, message",
  [
    ("raising", "(odd.py:11) raised IndexError: list index out of range"),
    ("dying", "the process was ended by SIGKILL, often for want of memory"),
  ],
)
def test_a_run_that_fails_does_not_keep_the_others(place, router, message):
  (place / "broken").touch()
  options = ("--seeds=0", "--points=odd,one")
  done = sweep(place, f"fails_{router}", *options, file=f"sweep.py:{router}")
  assert done.returncode == 1
  assert "odd/seed_0: failed: " in done.stderr and message in done.stderr
  assert state(place, f"fails_{router}/one/seed_0")["state"] == "done"
  page = (place / f"fails_{router}" / "index.html").read_text()
  assert "Not done" in page and message in page
  log = (place / f"fails_{router}" / "odd" / "seed_0" / "log.txt").read_text()
  (place / "broken").unlink()
  if router == "dying":
    return
  assert "in raising" in log  # the traceback
  again = sweep(place, f"fails_{router}", *options, file=f"sweep.py:{router}")
  assert again.returncode == 0, again.stderr
  assert again.stdout.count(": done in ") == 1  # only what had failed


def test_a_run_that_another_trains_is_left_alone(place):
  """Nor is it called failed: the other says how it ends."""
  folder = place / "shared" / "two" / "seed_0"
  folder.mkdir(parents=True)
  with RunLock(folder):
    done = sweep(place, "shared", "--points=two", "--seeds=0")
  assert done.returncode  # and there is nothing to compare
  assert "two/seed_0: another process trains it; left alone" in done.stdout
  assert not (folder / "sweep_state.json").exists()


@pytest.mark.slow
def test_as_an_array_of_jobs(place, finished, tmp_path):
  """An sbatch that runs the script's tasks here, one by one."""
  sbatch = tmp_path / "sbatch"
  sbatch.write_text(
    "#!/bin/bash\n"
    "for i in 0 1 2 3; do SLURM_ARRAY_TASK_ID=$i bash $1 || exit 1; done\n"
    "echo Submitted batch job 1\n"
  )
  sbatch.chmod(0o755)
  env = environment()
  env["PATH"] = f"{tmp_path}:{env['PATH']}"
  done = subprocess.run(
    command(
      "sweep", "--sweep=sweep.py", "--workdir=array", "--slurm", "--jobs=2",
      "--slurm-options=--partition=gpu --gpus=1",
    ),
    cwd=place, env=env, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert "#SBATCH --array=0-3%2\n" in done.stdout
  assert "#SBATCH --partition=gpu\n#SBATCH --gpus=1\n" in done.stdout
  assert "#SBATCH --signal=B:TERM@120\n" in done.stdout
  assert "Submitted batch job 1" in done.stdout
  for run in RUNS:
    assert validation(place, f"array/{run}") == validation(
      place, f"finished/{run}"
    )


@pytest.mark.parametrize(
  "options, message",
  [
    (["--points=three"], "no point three; there are two, one"),
    (["--seeds=a"], "--seeds=a must be like 0,1,2"),
    (["--task=4"], "--task=4 is not in [0, 3]"),
    (["--config.model.moe.num_experts=1"], "use 1 <= k <= 1"),
    (["--config.train.init_from=gone"], "gone is not the folder of a run"),
    (["--config.data.seq_len=64"], "two, one: no token store"),
    (["--sweep=sweep.py:beyond"], "odd: model.moe.router: odd has no router"),
    (
      ["--sweep=sweep.py:switch(group_size=24)"],
      "of 32 tokens are not groups of 24",
    ),
    (["--config.model.moe.router=top_k(k=3)"], "would undo what two, one set"),
    (["--config.seed=5"], "give --seeds"),
    (["--jobs=0"], "--jobs=0 must be at least 1"),
    (["--slurm"], "there is no sbatch on this machine"),
    (["--jbos=2"], "unknown argument '--jbos=2'; did you mean --jobs?"),
    (
      ["--dryrun"],
      "sweep: unknown argument '--dryrun'; did you mean --dry-run",
    ),
    (["--nonsense"], "sweep: unknown argument '--nonsense'"),
    (["--dry-run", "--sweep=sweep.py:top_k(kk=1)"], "no option kk"),
    (["--slurm", "--sweep=sweep.py:top_k(kk=1)"], "no option kk"),
    (
      ["--sweep=sweep.py:slipping"],
      "raised AttributeError: 'list' object has no attribute 'tokens'",
    ),
  ],
)
def test_bad_input_is_one_line_and_starts_nothing(
  place, options, message, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  args = ["sweep", "--sweep=sweep.py", "--workdir=bad", *options]
  assert main(args) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not list(place.glob("bad/*/seed_*"))


def test_another_configs_run_is_not_taken_for_ones_own(
  place, finished, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  args = ["sweep", "--sweep=sweep.py", "--workdir=finished"]
  for more in ([], ["--compare"], ["--task=1"]):
    assert main([*args, "--config.optimizer.eps=0.1", *more]) == 2
    error = capsys.readouterr().err
    assert "has a run of other settings (optimizer.eps: 1e-08 -> 0.1)" in error


def test_kernels_of_another_platform_are_left_to_the_runs(
  place, monkeypatch, capsys
):
  """The check runs on a CPU also where the runs have GPUs."""
  monkeypatch.chdir(place)
  sweep = load_sweep("sweep.py")
  check_points(plan_runs(sweep, ["--config.model.moe.matmul=gpu"]))


def test_when_all_runs_fail_the_reason_is_said(place, capfd, monkeypatch):
  monkeypatch.chdir(place)
  done = moejax(
    place, "sweep", "--sweep=sweep.py", "--workdir=hopeless", "--seeds=0",
    "--points=one", "--config.model.moe.matmul=gpu",
  )  # fmt: skip
  assert done.returncode == 2
  assert "one/seed_0: failed:" in done.stderr
  assert "it is for gpu, not cpu" in done.stderr
  assert "no run with a finished step to compare" in done.stderr


def wait_until(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)
