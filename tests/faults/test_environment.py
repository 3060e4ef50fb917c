# SPDX-License-Identifier: Apache-2.0
"""Clocks, locales, caches and devices that are not what they were."""

import os
import subprocess

from tests.small_run import command, environment
from tests.test_train import assert_same_run, digest, train

# Python runs this before anything else.
JUMPING_CLOCK = """
import time
_time, _calls = time.time, 0

def jumping():
  global _calls
  _calls += 1
  return _time() + (-1, 1)[_calls // 7 % 2] * 30 * 86400

time.time = jumping
"""


def train_with(place, workdir, env, *options):
  env = environment() | env
  return subprocess.run(
    command("train", "--config=config.py", f"--workdir={workdir}", *options),
    cwd=place, env={k: v for k, v in env.items() if v is not None},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def test_clock_zone_locale_and_hashes(place, unbroken, tmp_path):
  (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
  env = {
    "PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]]),
    "TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "5",
  }  # fmt: skip
  stop = train_with(place, "clock", env, "--config.train.num_steps=22",
                    "--config.optimizer.schedule.decay=0")  # fmt: skip
  assert stop.returncode == 0, stop.stderr
  done = train_with(place, "clock", env)
  assert done.returncode == 0, done.stderr
  # The trial's end was evaluated too.
  assert_same_run(place / "clock", unbroken, but=("eval.jsonl",
                                                  "samples.jsonl"))  # fmt: skip


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
