# SPDX-License-Identifier: Apache-2.0
"""The phases of published systems, with a kill in each of them.

Of the one that changes most, an eighth of the steps of `:tiny`; MOEJAX_WHOLE=1
trains all systems and all steps.
"""

import asyncio
import json
import os
import pathlib
import subprocess

import pytest

from moejax.cli import parse_config
from moejax.config import phases_of
from tests.faults.test_headline import wait_for_launch
from tests.small_run import command, environment
from tests.test_train import assert_same_run, wait_for_step

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
WHOLE = "MOEJAX_WHOLE" in os.environ
SHARE = 1 if WHOLE else 8
FOLDER = os.path.dirname(asyncio.__file__)
SYSTEMS = ["hunyuan_large"]
if WHOLE:
  SYSTEMS += ["olmoe_1b_7b", "jetmoe_8b", "dbrx_132b"]


def shortened(path):
  """Options that make its phases and steps an eighth as long."""
  config = parse_config(path, [])
  sources = (FOLDER, os.path.dirname(json.__file__))
  values = {
    "data.sources": ",".join(sources[: len(config.data.sources)]),
    "train.num_steps": config.train.num_steps // SHARE,
    "optimizer.schedule.warmup": config.optimizer.schedule.warmup // SHARE,
    "checkpoint.every": 3 if SHARE > 1 else 20,
    "eval.every": 5 if SHARE > 1 else 60, "eval.num_batches": 1,
  }  # fmt: skip
  phases = [
    {"name": p.name, "steps": p.steps // SHARE, "options": dict(p.options)}
    for p in config.train.phases
  ]
  values["train.phases"] = json.dumps(phases)
  return [f"--config.{key}={value}" for key, value in values.items()]


def start(place, path, *words):
  return subprocess.Popen(
    command(*words, f"--config={path}"),
    cwd=place, env=environment(), stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def run(place, path, *words):
  process = start(place, path, *words)
  out, error = process.communicate(timeout=900)
  assert process.returncode == 0, error
  return out


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_kill_in_each_phase(name, tmp_path):
  path = f"{ROOT / 'configs' / name}.py:tiny"
  options = shortened(path)
  phases = phases_of(parse_config(path, options))
  assert len(phases) >= 2
  run(tmp_path, path, "data", "prepare", *options)
  run(tmp_path, path, "train", "--workdir=whole", *options)
  for number, phase in enumerate(phases, 1):
    process = start(tmp_path, path, "train", "--workdir=killed", *options)
    step = (phase.start + phase.end + 1) // 2
    wait_for_launch(tmp_path / "killed", number, process)
    wait_for_step(tmp_path / "killed", step, process)
    assert process.poll() is None
    process.kill()
    process.communicate()
  out = run(tmp_path, path, "train", "--workdir=killed", *options)
  assert f"in {len(phases) + 1} launches" in out
  assert_same_run(tmp_path / "killed", tmp_path / "whole")
