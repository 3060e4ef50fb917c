# SPDX-License-Identifier: Apache-2.0
"""The README is true: its commands run, its paths exist, its code works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
  """Each `moejax ...` line of the README, in order."""
  lines = "\n".join(blocks("sh")).splitlines()
  return [line for line in lines if line.startswith("moejax ")]


def run(place, *args):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    args, cwd=place, env=environment, capture_output=True, text=True,
    timeout=900,
  )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder that looks like a checkout to relative paths."""
  place = tmp_path_factory.mktemp("checkout")
  shutil.copytree(ROOT / "configs", place / "configs")
  for code in blocks("python"):
    if name := re.match(r"# (my_\w+\.py)", code):
      (place / name[1]).write_text(code)
  return place


@pytest.mark.slow
def test_the_commands_run_in_order_and_so_does_the_python(place):
  assert len(commands()) >= 7
  for line in commands():
    words = [word.strip('"') for word in re.findall(r'(?:"[^"]*"|\S)+', line)]
    words = [re.sub(r'="(.*)$', r"=\1", word) for word in words]
    done = run(place, sys.executable, "-m", *words)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
  code = next(b for b in blocks("python") if "load_run" in b)
  done = run(place, sys.executable, "-c", code)
  assert done.returncode == 0, done.stderr


def test_make_has_the_targets():
  for line in "\n".join(blocks("sh")).splitlines():
    if line.startswith("make "):
      done = run(ROOT, "make", "-n", line.split()[1])
      assert done.returncode == 0, done.stderr


def test_paths_exist():
  links = re.findall(r"\]\(([^)#]+)\)", README)
  named = re.findall(r"`((?:moejax|configs|docs|benchmarks)/[\w./]*)`", README)
  assert len(links) > 4
  assert len(named) > 15
  for path in links + named:
    assert (ROOT / path).exists(), path


def test_the_router_of_the_readme_routes(tmp_path, monkeypatch):
  import jax.numpy as jnp

  from moejax.routing import resolve
  from moejax.spec import Spec

  code = next(b for b in blocks("python") if "my_router" in b)
  (tmp_path / "my_router.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "my_router", raising=False)
  spec = re.search(r'router="(.*?)"\n', code)[1]
  router = resolve(Spec.parse(spec))
  routing = router(jnp.array([[0.1, 0.9, 0.5]]), jnp.ones(1, bool), rng=None)
  assert routing.expert_A.tolist() == [1, 2]
