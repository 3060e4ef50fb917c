# SPDX-License-Identifier: Apache-2.0
"""Processes train one model: as one would, at any number, killed or not."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.parallel.peers import EXIT_PEER_LOST
from tests.small_run import command, environment, make_place, moejax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

STEPS = 24
# Two sources, packed: what could go wrong between processes that read.
SOURCES = [
  "--config.data.sources=('text','more')", "--config.data.weights=(0.7,0.3)",
  "--config.checkpoint.keep_last=20", f"--config.train.num_steps={STEPS}",
]  # fmt: skip
FOUR = ["--config.parallel.expert=2", "--config.parallel.fsdp=2"]
TWO = ["--config.parallel.expert=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("processes"))
  (place / "more").mkdir()
  for i in range(40):
    (place / "more" / f"{i}.txt").write_text(f"line {i} of more " * (i + 3))
  done = moejax(place, "data", "prepare", "--config=config.py", *SOURCES)
  assert done.returncode == 0, done.stderr
  return place


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(place, count, run, *options, port=None, indices=None, before=()):
  """Processes of a run, one device each; `before` goes before the command."""
  port = port or free_port()
  return [
    subprocess.Popen(
      [
        *before,
        *command(
          "train",
          "--config=config.py",
          f"--workdir={run}",
          *SOURCES,
          *options,
          f"--coordinator=localhost:{port}",
          f"--num-processes={count}",
          f"--process-id={i}",
        ),
      ],
      cwd=place,
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in (range(count) if indices is None else indices)
  ]


def finish(processes, timeout=900):
  """(status, output, errors) of each."""
  try:
    out = [p.communicate(timeout=timeout) for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *texts) for p, texts in zip(processes, out)]


def run_all(place, count, run, *options):
  done = finish(start(place, count, run, *options))
  assert [status for status, *_ in done] == [0] * count, done
  return done


# In place of Slurm's own: two tasks, here.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID=$((RANDOM + 70000)) SLURM_STEP_NODELIST=localhost
export SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
status=0
for i in 0 1; do wait -n || status=$?; done
exit $status
"""


def test_the_slurm_script_as_it_is(place, alone):
  (place / "bin").mkdir()
  (place / "bin" / "srun").write_text(SRUN)
  moejax_command = f'#!/bin/sh\nexec {sys.executable} -m moejax "$@"\n'
  (place / "bin" / "moejax").write_text(moejax_command)
  for name in ("srun", "moejax"):
    (place / "bin" / name).chmod(0o755)
  script = ROOT / "experiments" / "pods" / "slurm.sh"
  env = environment()
  env |= {
    "PATH": f"{place / 'bin'}:{env['PATH']}",
    "MOEJAX": str(place / "bin" / "moejax"),
  }
  done = subprocess.run(
    ["bash", script, "config.py", "slurm", *SOURCES, *TWO], cwd=place, env=env,
    capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "mesh: expert=2 on 2 devices" in done.stdout
  assert_same_training(metrics(place, "slurm"), alone)


def metrics(place, run):
  text = (place / run / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def assert_same_training(got, want):
  assert len(got) == len(want) == STEPS
  for mine, other in zip(got, want):
    # So many targets in each step's rows: the very same batches.
    assert mine["tokens"] == other["tokens"]
    for name, value in other.items():
      np.testing.assert_allclose(
        mine[name], value, rtol=2e-3, atol=1e-6, err_msg=name
      )
    assert mine["loss/xent"] == pytest.approx(other["loss/xent"], rel=2e-4)


@pytest.fixture(scope="module")
def alone(place):
  done = moejax(
    place, "train", "--config=config.py", "--workdir=alone", *SOURCES
  )
  assert done.returncode == 0, done.stderr
  return metrics(place, "alone")


@pytest.fixture(scope="module")
def by_four(place):
  done = run_all(place, 4, "four", *FOUR)
  return done, metrics(place, "four")


def test_four_processes_train_what_one_does(by_four, alone):
  done, got = by_four
  assert_same_training(got, alone)
  # One of them speaks.
  assert "mesh: fsdp=2, expert=2 on 4 devices" in done[0][1]
  for _, out, _ in done[1:]:  # a library's own lines apart
    own = ("[Gloo]", "waiting for the others")
    assert not [x for x in out.splitlines() if not x.startswith(own)]


@pytest.mark.parametrize("count", [1, 2])
def test_others_go_on_from_what_four_saved(place, by_four, alone, count):
  run = place / f"four_then_{count}"
  shutil.copytree(place / "four", run)
  shutil.rmtree(run / "checkpoints" / str(STEPS))
  if count == 1:
    done = moejax(
      place, "train", "--config=config.py", f"--workdir={run.name}", *SOURCES
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
  else:
    out = run_all(place, count, run.name, *TWO)[0][1]
  assert "goes on at step 20" in out
  assert_same_training(metrics(place, run.name), alone)


def wait_for_step(place, run, step, processes):
  path, limit = place / run / "metrics.jsonl", time.monotonic() + 600
  while time.monotonic() < limit:
    if path.exists() and len(path.read_bytes().splitlines()) >= step:
      return
    assert all(p.poll() is None for p in processes), finish(processes)
    time.sleep(0.02)
  pytest.fail(f"{run} has not come to step {step}")


@pytest.mark.parametrize(
  "lost, number",
  [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_one_that_is_lost_ends_the_others_by_name(place, alone, lost, number):
  """Killed or hung: they stop, say who it was, and all go on later."""
  run = f"lost_{number.name}_{lost}"
  slow = ("--config.eval.every=1", "--lost-after=8")
  processes = start(place, 2, run, *TWO, *slow)
  wait_for_step(place, run, 7, processes)
  gone, other = processes[lost], processes[1 - lost]
  gone.send_signal(number)
  begun = time.monotonic()
  _, errors = other.communicate(timeout=120)
  assert time.monotonic() - begun < 60
  gone.kill()
  gone.communicate()
  assert other.returncode == EXIT_PEER_LOST, errors
  who = f"process {1 - lost} of 2 stops: process {lost} (pid {gone.pid}"
  assert who in errors
  how = "is dead" if number == signal.SIGKILL else "gave no sign of life"
  assert how in errors
  # The checkpoints are the same ones, whoever is lost, and however.
  if lost == 1 and number == signal.SIGKILL:
    run_all(place, 2, run, *TWO)
    assert_same_training(metrics(place, run), alone)


def test_a_lost_leader_on_another_host_is_named(place, tmp_path):
  """JAX aborts the others at once, in words of its own; ours say who it was."""
  hosts = tmp_path / "hosts"
  hosts.write_text("127.0.0.1 localhost other\n")
  script = f"hostname other && mount --bind {hosts} /etc/hosts"
  inside = ["unshare", "--uts", "--mount", "sh", "-c"]
  if subprocess.run([*inside, script], capture_output=True).returncode:
    pytest.skip("a host name of its own needs root")
  options, port = (*TWO, "--config.eval.every=1"), free_port()
  (first,) = start(place, 2, "leader", *options, port=port, indices=[0])
  before = [*inside, f'{script} && exec "$@"', "sh"]
  (other,) = start(
    place, 2, "leader", *options, port=port, indices=[1], before=before
  )
  wait_for_step(place, "leader", 7, [first, other])
  first.kill()
  begun = time.monotonic()
  _, errors = other.communicate(timeout=120)
  assert time.monotonic() - begun < 60
  first.communicate()
  assert other.returncode != 0
  assert f"process 0 (pid {first.pid} on {socket.gethostname()})" in errors
  assert "process 1 of 2 was aborted, as said above" in errors


def test_processes_of_different_settings_do_not_train(place):
  port, rate = free_port(), "--config.optimizer.learning_rate=0.5"
  (first,) = start(place, 2, "unlike", *TWO, port=port, indices=[0])
  (other,) = start(place, 2, "unlike", *TWO, rate, port=port, indices=[1])
  (status_0, _, said), (status_1, _, errors) = finish([first, other])
  assert [status_0, status_1] == [2, 2]
  what = "settings of process 0: optimizer.learning_rate: 0.01 -> 0.5; start"
  assert what in errors
  assert "another process has not the settings of process 0; start" in said
  assert not (place / "unlike" / "checkpoints").exists()


def test_a_mistake_ends_all_with_one_line(place):
  done = finish(start(place, 2, "wrong", "--config.parallel.expert=4"))
  for index, (status, _, errors) in enumerate(done):
    assert status in (2, EXIT_PEER_LOST)
    lines = [x for x in errors.splitlines() if x.startswith("moejax")]
    assert len(lines) == 1
    assert "is a mesh of 4 devices, there are 2" in lines[0], index
  assert not (place / "wrong" / "config.json").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_nobody_there(place, index):
  (done,) = finish(
    start(place, 2, "nobody", "--join-timeout=3", indices=[index]), timeout=60
  )
  status, said, errors = done
  assert status == 2
  assert "waiting for the others at localhost:" in said
  lines = [x for x in errors.splitlines() if x.startswith("moejax")]
  assert len(lines) == 1
  assert f"process {index} could not join the others at localhost" in lines[0]


def test_no_cluster_to_be_found(place):
  done = moejax(
    place, "train", "--config=config.py", "--workdir=none", "--distributed"
  )
  assert done.returncode == 2
  assert "cannot join other processes: " in done.stderr
  assert done.stderr.count("\n") == 1


def test_an_address_without_a_port(place):
  done = moejax(
    place, "train", "--config=config.py", "--workdir=nowhere",
    "--coordinator=localhost", "--num-processes=2", "--process-id=0",
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and "is not HOST:PORT" in done.stderr


def test_half_an_address(place):
  done = moejax(
    place, "train", "--config=config.py", "--workdir=half", "--process-id=1"
  )
  assert done.returncode == 2
  assert "go together" in done.stderr
