# SPDX-License-Identifier: Apache-2.0
"""Clocks, locales, caches and devices that are not what they were."""

import json
import os
import subprocess

import pytest

from moejax.metrics import TIMING
from tests.faults import faulty
from tests.small_run import command, environment
from tests.test_train import assert_same_run, digest, lines, train


def train_with(place, workdir, env, *options):
  env = environment() | env
  return subprocess.run(
    command("train", "--config=config.py", f"--workdir={workdir}", *options),
    cwd=place, env={k: v for k, v in env.items() if v is not None},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.mark.parametrize("days", [30, -30])
def test_clock_zone_locale_and_hashes(place, unbroken, days):
  env = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "5"}
  run = f"clock{days}"
  done = train_with(place, run, env, *faulty.option(7, "jump", str(days)))
  assert done.returncode == 0, done.stderr
  assert_same_run(place / run, unbroken)
  times = [json.loads(line)["wall_time"] for line in lines(place / run, TIMING)]
  assert max(times) - min(times) > 29 * 86400  # it did jump


def test_a_damaged_cache_of_programs(place, unbroken, tmp_path):
  env = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None}
  env |= {name: None for name in os.environ if name.startswith("JAX_PERSIST")}
  first = train_with(place, "filling", env)
  assert first.returncode == 0, first.stderr
  programs = [p for p in tmp_path.rglob("*-cache") if p.is_file()]
  assert programs, "nothing was kept"
  second = train_with(place, "kept", env)
  assert second.returncode == 0, second.stderr
  assert digest(place / "kept") == digest(unbroken)
  for number, path in enumerate(programs):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data[: len(data) // 2] if number % 2 else data)
  third = train_with(place, "damaged_cache", env)
  assert third.returncode == 0, third.stderr
  assert digest(place / "damaged_cache") == digest(unbroken)


def test_fewer_devices_than_the_mesh(place):
  done = train(place, "few", "--config.parallel.data=4")
  assert done.returncode == 2
  assert "4" in done.stderr and "device" in done.stderr
  assert done.stderr.count("\n") == 1
  assert not (place / "few").exists()
