# SPDX-License-Identifier: Apache-2.0
"""Plans of pods, by the compiler of the chips."""

import dataclasses
import importlib
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax import cli
from moejax.plan.cache import CompilerAborts
from moejax.plan.search import candidates
from tests.small_run import environment

ROOT = Path(__file__).parents[2]


def plan(*args):
  return subprocess.run(
    [sys.executable, "-m", "moejax", "plan", "--config=configs/tiny.py", *args],
    cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
  )  # fmt: skip


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v7:2x2", "use KIND:SHAPE, such as v5e:4x4"),
    ("v5p", "kinds are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200"),
    ("h100:16", "such as v5e:4x4, v5p:4x4x4, v6e:8x8, h100:8x8 (8 nodes of 8"),
  ],
)
def test_a_topology_that_is_none(topology, message):
  done = plan(f"--topology={topology}")
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


def test_no_compiler_here():
  if importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is here")
  done = plan("--topology=v5e:2x2")
  assert done.returncode == 2
  assert "pip install -c constraints.txt -e '.[plan]'" in done.stderr


@pytest.fixture
def libtpu():
  pytest.importorskip("libtpu", reason="the [plan] extra is not installed")


@pytest.mark.tpu
@pytest.mark.slow
def test_a_step_is_compiled_for_chips_that_are_not_here(libtpu):
  done = plan(
    "--topology=v5e:2x2", "--config.parallel.expert=4",
    "--config.model.num_layers=2",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "4 x v5e; mesh: expert 4" in done.stdout
  assert "of 15.8 GiB: fits" in done.stdout


@pytest.mark.tpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_refused(libtpu):
  done = plan(
    "--topology=v5e:2x2", "--config.parallel.expert=4",
    "--config.model.num_layers=2", "--config.model.d_model=8192",
    "--config.model.moe.d_expert=65536",
  )  # fmt: skip
  assert done.returncode == 2, done.stdout
  assert "the compiler refuses this step on v5e:2x2: " in done.stderr


@pytest.mark.tpu
def test_other_numbers_of_chips(libtpu):
  done = plan("--topology=v5e:2x2")
  assert done.returncode == 2
  assert "a mesh of 1 devices, there are 4; use --config.parallel.data=4" in (
    done.stderr
  )
  done = plan("--topology=v5e:3x7x5")
  assert done.returncode == 2
  assert "v5e:3x7x5 is not known to the compiler" in done.stderr


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path / "moejax" / "plans"


def small_plan(*args):
  return plan("--topology=v5e:2x2", "--config.model.num_layers=2", *args)


@pytest.mark.tpu
@pytest.mark.slow
def test_the_same_question_is_answered_from_the_cache(libtpu, own_cache):
  first = small_plan("--config.parallel.fsdp=4")
  (kept,) = own_cache.iterdir()
  before = kept.stat().st_mtime_ns
  again = small_plan("--config.parallel.fsdp=4", "--price=2")
  assert kept.stat().st_mtime_ns == before
  priced = [x for x in again.stdout.splitlines() if x.startswith("price")]
  assert priced
  lines = [x for x in again.stdout.splitlines() if x not in priced]
  assert lines == first.stdout.splitlines()
  kept.write_text("{")  # half an answer is none
  assert small_plan("--config.parallel.fsdp=4").returncode == 0
  assert kept.stat().st_mtime_ns != before


@pytest.mark.tpu
@pytest.mark.slow
def test_a_search_ranks_what_fits(libtpu, own_cache):
  done = small_plan("--search", "--config.model.moe.num_experts=5")
  assert done.returncode == 0, done.stderr
  rows = [x for x in done.stdout.splitlines() if re.search(r"\d%", x)]
  meshes = {
    x[:34].strip() for x in rows if x.startswith(("fsdp", "expert", "data"))
  }
  # Five experts divide by nothing.
  assert meshes == {"fsdp 4", "data 2, fsdp 2", "data 4"}
  remats = {x[34:].split()[0] for x in rows if x[:34].strip() in meshes}
  assert remats == {"full", "exchange", "experts", "dots", "none"}
  best = done.stdout.partition("the fastest that fits:")[2]
  assert "--config.model.remat=" in best.splitlines()[1]


def test_meshes_that_are_tried():
  config = cli.parse_config(
    str(ROOT / "configs/tiny.py"), ["--config.model.moe.num_experts=12"]
  )
  found = list(candidates(config, 8))
  assert all(p.num_devices == 8 for p in found)
  assert [p.expert for p in found] == [1, 2, 4]
  assert {p.tensor for p in found} == {1}
  # Of 96 and twice as much, a power of two alone would leave no mesh.
  large = cli.parse_config(
    str(ROOT / "configs/olmoe_1b_7b.py"), ["--config.train.batch_size=192"]
  )
  found = [(p.data, p.fsdp) for p in candidates(large, 96)]
  assert found[0] == (3, 32)
  # Fewer rows than devices: heads or tokens are split as well.
  few = dataclasses.replace(
    config, train=dataclasses.replace(config.train, batch_size=2)
  )
  found = list(candidates(few, 8))
  assert {(p.tensor, p.sequence) for p in found} == {(4, 1), (1, 4)}


def test_meshes_whose_parameters_would_not_divide_are_not_tried():
  """Of 6400 = 256 * 25, no 1024 devices hold equal parts."""
  config = cli.parse_config(str(ROOT / "configs/hunyuan_large.py"), [])
  found = list(candidates(config, 1024))
  assert [(p.data, p.fsdp, p.expert) for p in found] == [
    (8, 128, 1), (4, 128, 2), (4, 64, 4), (4, 32, 8), (4, 16, 16),
  ]  # fmt: skip


def test_a_search_goes_on_when_the_compiler_aborts(monkeypatch, capsys):
  """Steps that do that differ by version of the compiler; none is sure to."""
  config = cli.parse_config(str(ROOT / "configs/tiny.py"), [])
  asked = []

  def abort(config, topology, fresh):
    asked.append(config.parallel.overlap)
    raise CompilerAborts(f"{config.parallel.overlap} aborts")

  module = importlib.import_module("moejax.plan.search")
  monkeypatch.setattr(module, "cached_plan", abort)
  tries = module._Tries(config, "v5e:2x2", fresh=False)
  assert tries.attempt(config.parallel, "full") == math.inf
  assert tries.attempt(config.parallel, "dots") == math.inf
  assert asked == ["kernels", "other", "other"]
  assert "from here on overlap=other" in capsys.readouterr().out


def test_every_way_to_split_a_row_is_searched(monkeypatch):
  """Splitting heads gets slower; splitting tokens is tried all the same."""
  config = cli.parse_config(
    str(ROOT / "configs/tiny.py"), ["--config.train.batch_size=16"]
  )
  module = importlib.import_module("moejax.plan.search")

  def seconds(config, topology, fresh):
    slow = 10 if config.parallel.tensor > 1 else 1
    found = slow * config.parallel.expert
    return SimpleNamespace(roofline=SimpleNamespace(seconds=found))

  monkeypatch.setattr(module, "cached_plan", seconds)
  monkeypatch.setattr(module, "summary", lambda config, plan: "")
  monkeypatch.setattr(module, "devices_of", lambda topology: range(32))
  (best, _), *_ = module.search(config, "v5e:4x8")
  assert (best.parallel.sequence, best.parallel.tensor) == (2, 1)


@pytest.mark.tpu
@pytest.mark.slow
def test_a_search_without_any_mesh(libtpu):
  done = small_plan(
    "--search", "--config.train.batch_size=3", "--config.data.seq_len=127",
    "--config.model.num_heads=3", "--config.model.num_kv_heads=3",
  )  # fmt: skip
  assert done.returncode == 2
  assert "no mesh of 4 devices divides batch_size=3" in done.stderr


@pytest.mark.parametrize("price", ["-1", "nan", "much"])
def test_a_price_that_is_none(price):
  done = plan("--topology=v5e:2x2", f"--price={price}")
  assert done.returncode == 2
  assert "--price" in done.stderr
