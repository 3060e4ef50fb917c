# SPDX-License-Identifier: Apache-2.0
"""What a user meets first: the install, the import and the command."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from moejax.__main__ import COMMANDS, main, usage

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "numpy", "optax", "orbax", "grain", "matplotlib")


@pytest.fixture(scope="module")
def project():
  return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(code):
  """Standard output of a fresh interpreter."""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_is_light():
  code = (
    "import sys, time; start = time.perf_counter(); import moejax, "
    "moejax.__main__; print(time.perf_counter() - start, *sys.modules)"
  )
  runs = [run_python(code).split() for _ in range(3)]
  # The quickest of three: the others may have met a busy machine.
  assert min(float(seconds) for seconds, *_ in runs) < 2
  loaded = {name.partition(".")[0] for name in runs[0][1:]}
  assert not loaded & {*HEAVY, "tensorflow", "torch", "transformers"}


def test_tensorflow_is_never_imported():
  """Not even where it is installed: a stand-in on the path would be found."""
  code = """
import importlib, pathlib, pkgutil, sys
import moejax
class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == "tensorflow":
      raise AssertionError("tensorflow is imported")
sys.meta_path.insert(0, Refuse())
for module in pkgutil.walk_packages(moejax.__path__, "moejax."):
  if not module.name.endswith("__main__"):
    importlib.import_module(module.name)
print(sum(name.startswith("moejax.") for name in sys.modules))
"""
  assert int(run_python(code)) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command):
  module, doc = COMMANDS[command]
  assert importlib.util.find_spec(module), module
  assert doc


def test_usage_fits_a_screen(capsys):
  assert main(["--help"]) == 0
  printed = capsys.readouterr().out
  assert printed.strip() == usage().strip()
  lines = printed.splitlines()
  assert len(lines) <= 24
  assert max(map(len, lines)) <= 80
  assert all(command in printed for command in COMMANDS)


def test_unknown_command_names_the_known(capsys):
  assert main(["trian"]) == 2
  assert "train" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, capsys):
  def interrupted(argv):
    raise KeyboardInterrupt

  monkeypatch.setattr("moejax.report.main", interrupted)
  assert main(["report"]) == 130
  assert capsys.readouterr().err == "moejax report: stopped\n"


def test_a_reader_that_has_enough_is_no_error():
  process = subprocess.Popen(
    [sys.executable, "-m", "moejax", "train", "--help-config"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
  )  # fmt: skip
  process.stdout.close()
  with process:
    error = process.stderr.read()
  assert (process.returncode, error) == (141, b"")


def test_console_script_is_main(project):
  assert project["scripts"] == {"moejax": "moejax.__main__:main"}


def test_dependencies_are_bounded_on_both_sides(project):
  for requirement in project["dependencies"]:
    assert re.fullmatch(r"[\w.-]+>=[\d.]+,<[\d.]+", requirement), requirement


def test_constraints_pin_every_dependency_and_name_no_host(project):
  text = (ROOT / "constraints.txt").read_text()
  assert "://" not in text
  assert "--" not in text
  pinned = set()
  for line in text.splitlines():
    match = re.fullmatch(r"([a-z0-9-]+)==[\w.]+( ; .+)?", line)
    assert match, line
    pinned.add(match[1])
  extras = project["optional-dependencies"]
  for requirement in project["dependencies"] + extras["dev"]:
    name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
    assert name in pinned, requirement


def test_one_version_of_ruff():
  hooks = (ROOT / ".pre-commit-config.yaml").read_text()
  constraints = (ROOT / "constraints.txt").read_text()
  pinned = re.search(r"^ruff==.+$", constraints, re.MULTILINE)[0]
  assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


def test_only_sources_are_tracked():
  """A download left in the root went in once."""
  done = subprocess.run(
    ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT
  )
  if done.returncode:
    pytest.skip("not in a checkout of git")
  paths = [ROOT / name for name in done.stdout.split("\0") if name]
  assert paths
  large = [p for p in paths if p.exists() and p.stat().st_size > 1 << 20]
  packed = [p for p in paths if p.suffix in (".whl", ".gz", ".zip", ".tar")]
  assert not large + packed
