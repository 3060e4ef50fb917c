# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again ends as one that never was.

Packing, a mixture of two sources, phases that change it and the rows' length,
evaluation of the mixture and of a further set, averaged weights, the guard.
"""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from moejax import goodput
from tests.multi_process.test_training import finish, free_port
from tests.small_run import command, environment, make_place, moejax
from tests.test_train import assert_same_run, lines, wait_for_step

pytestmark = pytest.mark.slow

STEPS = 300
PHASES = [
  {"name": "main", "steps": 120},
  {"name": "mix", "steps": 90, "options": {"data.weights": [1.0, 3.0]}},
  {
    "name": "long", "steps": 50,
    "options": {
      "data.seq_len": 64, "train.batch_size": 2, "model.rope_theta": 1e6
    },
  },
  {
    "name": "anneal",
    "options": {
      "data.order": 1, "optimizer.schedule.name": "linear",
      "optimizer.schedule.warmup": 0.0, "optimizer.schedule.final": 0.0,
    },
  },
]  # fmt: skip
SETS = [{"name": "numbers", "data": ["more"], "every": 70, "num_batches": 3}]
OPTIONS = {
  "train.num_steps": STEPS, "train.phases": json.dumps(PHASES),
  "data.sources": "text,more", "data.weights": "3,1",
  "optimizer.schedule.decay": 0, "optimizer.ema": 0.99,
  # Less chaos: what rounding changes stays small for hundreds of steps.
  "optimizer.learning_rate": 1e-3,
  "stability.spike": 6, "stability.window": 16,
  "eval.every": 50, "eval.sets": json.dumps(SETS), "eval.ema": True,
  "checkpoint.every": 25,
}  # fmt: skip


def words(**more):
  options = OPTIONS | {k.replace("__", "."): v for k, v in more.items()}
  return [f"--config.{key}={value}" for key, value in options.items()]


def start(place, workdir, **more):
  return subprocess.Popen(
    command(
      "train", "--config=config.py", f"--workdir={workdir}", *words(**more)
    ),
    cwd=place, env=environment(), stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def complete(place, workdir, **more):
  process = start(place, workdir, **more)
  out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("headline"))
  (place / "more").mkdir()
  for i in range(40):
    text = " ".join(str(j * i) for j in range(2 * i + 3))
    (place / "more" / f"{i}.txt").write_text(text)
  done = moejax(place, "data", "prepare", "--config=config.py", *words())
  assert done.returncode == 0, done.stderr
  return place


@pytest.fixture(scope="module")
def undisturbed(place):
  complete(place, "undisturbed")
  return place / "undisturbed"


def wait_for_launch(run, number, process):
  """Until the run's loop has begun for the so manyth time."""
  path = run / goodput.LAUNCHES
  limit = time.monotonic() + 600
  while time.monotonic() < limit and process.poll() is None:
    begun = path.read_text().count('"setup"') if path.exists() else 0
    if begun >= number:  # some have a line of their end, too
      return
    time.sleep(0.01)
  pytest.fail(f"launch {number} has not begun; status {process.poll()}")


def disturb(process, rng):
  """One of the things that happen; returns the exit status to expect."""
  number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM,
                       signal.SIGSTOP])  # fmt: skip
  process.send_signal(number)
  if number == signal.SIGSTOP:
    time.sleep(rng.uniform(0.5, 2))
    process.send_signal(signal.SIGCONT)
    time.sleep(rng.uniform(0, 0.5))
    number = signal.SIGKILL
    process.send_signal(number)
  return {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[number]


def test_killed_at_random(place, undisturbed):
  rng = random.Random(os.environ.get("MOEJAX_KILL_SEED", "0"))
  run = place / "killed"
  for number, step in enumerate(sorted(rng.sample(range(3, STEPS - 10), 7))):
    process = start(place, "killed")
    wait_for_launch(run, number + 1, process)
    wait_for_step(run, step, process)
    time.sleep(rng.uniform(0, 0.2))
    expected = disturb(process, rng)
    _, error = process.communicate(timeout=300)
    assert process.returncode == expected, error
  out = complete(place, "killed")
  assert_same_run(run, undisturbed)
  found = goodput.of_run(run)
  assert found.launches == 8
  assert found.describe() in out
  print(found.describe())
  # Every second is somewhere, and steps that were done again are counted.
  assert sum(found.parts.values()) == pytest.approx(found.total, rel=0.02)
  # At most those since the save before the one that was being written.
  assert 0 < found.redone_steps < 7 * 2 * 25


def test_other_numbers_of_hosts(place, undisturbed):
  """One process, then two, then one: the same batches, nearly the same losses.

  Sums over devices are added up in another order, and what that changes grows
  as steps follow each other.
  """
  complete(place, "hosts", train__num_steps=100)
  port = free_port()
  both = [
    subprocess.Popen(
      [
        *command("train", "--config=config.py", "--workdir=hosts"),
        *words(train__num_steps=200, parallel__data=2),
        f"--coordinator=localhost:{port}", "--num-processes=2",
        f"--process-id={i}",
      ],
      cwd=place, env=environment(), stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  done = finish(both)
  assert [status for status, *_ in done] == [0, 0], done
  complete(place, "hosts")
  got, want = (
    [json.loads(line) for line in lines(run)]
    for run in (place / "hosts", undisturbed)
  )
  assert [row["step"] for row in got] == list(range(1, STEPS + 1))
  for mine, other in zip(got, want):
    assert mine["batch_digest"] == other["batch_digest"]
    assert mine["tokens"] == other["tokens"]

  def difference(first, last):
    ours, theirs = (
      np.array([row["loss/xent"] for row in rows[first:last]])
      for rows in (got, want)
    )
    return np.abs(ours / theirs - 1).max()

  assert difference(0, 100) == 0
  assert difference(100, 130) < 1e-5
  assert difference(130, STEPS) < 1e-3


def test_the_batches_are_all_different(undisturbed):
  digests = [json.loads(line)["batch_digest"] for line in lines(undisturbed)]
  assert len(set(digests)) > 0.95 * len(digests)
