# SPDX-License-Identifier: Apache-2.0
"""Sweep files: what they may say, and what is said of wrong ones."""

import textwrap

import pytest

from moejax.errors import ConfigError
from moejax.sweep import Sweep, grid
from moejax.sweep.spec import load_sweep, plan_runs
from tests.small_run import CONFIG


def write(folder, points, **options):
  (folder / "config.py").write_text(CONFIG)
  said = "".join(f", {name}={value!r}" for name, value in options.items())
  (folder / "sweep.py").write_text(
    textwrap.dedent(f'''\
    """Is more better?

    Second paragraph.
    """
    from moejax.sweep import Sweep
    def get_sweep():
      return Sweep(config="config.py", points={points!r}{said})
    ''')
  )
  return str(folder / "sweep.py")


def test_each_point_with_each_seed(tmp_path):
  points = {
    "few": {"model.moe.router": "top_k(k=1)"},
    "many": {"model.moe.router": "top_k(k=3)", "optimizer.eps": 1e-5},
  }
  sweep = load_sweep(write(tmp_path, points, seeds=(3, 7)))
  assert sweep.title == "Is more better?"
  assert sweep.reference == "few"
  planned = plan_runs(sweep, ["--config.train.batch_size=2"])
  assert [run.name for run in planned] == [
    "few/seed_3", "many/seed_3", "few/seed_7", "many/seed_7",
  ]  # fmt: skip
  for run in planned:
    assert run.config.seed == run.seed
    assert run.config.train.batch_size == 2
    assert run.config.model.moe.router == points[run.point]["model.moe.router"]
  assert planned[1].config.optimizer.eps == 1e-5
  assert planned[0].config.optimizer.eps == 1e-8


def test_common_options_come_before_a_points_own(tmp_path):
  points = {"a": {}, "b": {"train.num_steps": 30}}
  sweep = load_sweep(write(tmp_path, points, common={"train.num_steps": 20}))
  steps = {r.point: r.config.train.num_steps for r in plan_runs(sweep)}
  assert steps == {"a": 20, "b": 30}


def test_a_grid_is_all_combinations():
  points = grid({
    "optimizer.eps": [1e-8, 1e-5],
    "model.moe.router": {"one": "top_k(k=1)", "two": "top_k(k=2)"},
  })  # fmt: skip
  assert points["eps=1e-05_two"] == {
    "optimizer.eps": 1e-5, "model.moe.router": "top_k(k=2)"
  }  # fmt: skip
  assert list(points) == [
    "eps=1e-08_one", "eps=1e-08_two", "eps=1e-05_one", "eps=1e-05_two",
  ]  # fmt: skip
  assert grid({"model.pattern": [("moa/moe",)]}).keys() == {"pattern=moa-moe"}
  assert Sweep(config="x.py", points=points)
  files = grid({"data.tokenizer": ["a.json", "b.json"]})
  assert Sweep(config="x.py", points=files)
  assert list(grid({"optimizer.x": [-1, 1]})) == ["x=-1", "x=1"]


@pytest.mark.parametrize(
  "axes",
  [
    {"a": {"one": 1, "one_two": 2}, "b": {"two_three": 1, "three": 2}},
    {"a": ["a b", "a-b"]},
  ],
)
def test_a_grid_loses_no_point(axes):
  with pytest.raises(ConfigError, match="two points are called"):
    grid(axes)


@pytest.mark.parametrize(
  "points, options, message",
  [
    ({}, {}, "at least one point and one seed"),
    ({"a": {}}, {"seeds": ()}, "at least one point and one seed"),
    ({"a": {}}, {"seeds": (1, 1)}, "has one of them twice"),
    ({"a/b": {}}, {}, "point 'a/b' names a folder"),
    ({"..": {}}, {}, "names a folder"),
    ({"a": {}}, {"baseline": "b"}, "baseline='b' is none of the points a"),
    ({"a": {"seed": 3}}, {}, "cannot set seed: give seeds"),
    ({"a": {}}, {"common": {"seed": 3}}, "cannot set seed: give seeds"),
    ({"a": None}, {}, "are a dictionary of dictionaries"),
    (["a", "b"], {}, "are a dictionary of dictionaries"),
    ({1: {}}, {}, "point 1 names a folder"),
    ({"a" * 101: {}}, {}, "at most 100"),
    ({"index.html": {}}, {}, "is called as a file of the sweep"),
    ({"Slurm-1_0.log": {}}, {}, "is called as a file of the sweep"),
    ({"a": {}, "A": {}}, {}, "are one folder on some disks"),
    ({"a": {}}, {"seeds": 3}, "seeds=3 are whole numbers"),
    ({"a": {}}, {"seeds": (0.5,)}, "are whole numbers"),
  ],
)
def test_what_is_no_sweep(tmp_path, points, options, message):
  with pytest.raises(ConfigError, match=message):
    load_sweep(write(tmp_path, points, **options))


def test_what_points_set_is_not_overridden(tmp_path):
  """Else all of them would be one, under their names."""
  points = {"one": {"optimizer.eps": 1e-8}, "two": {"optimizer.eps": 1e-5}}
  sweep = load_sweep(write(tmp_path, points | {"plain": {}}))
  with pytest.raises(ConfigError, match=r"eps would undo what one, two set"):
    plan_runs(sweep, ["--config.optimizer.eps=1e-6"])


def test_wrong_points_are_all_named_at_once(tmp_path):
  points = {
    "fine": {},
    "misspelt": {"model.moe.num_expert": 4},
    "typed": {"train.num_steps": "ten"},
    "too_many": {"model.moe.router": "top_k(k=9)"},
    "too_many_too": {"model.moe.router": "top_k(k=9)"},
  }
  with pytest.raises(ConfigError) as e:
    plan_runs(load_sweep(write(tmp_path, points)))
  text = str(e.value)
  assert text.startswith("4 points cannot be built, nothing was started.")
  assert "misspelt: no option 'model.moe.num_expert'; did you mean" in text
  assert "typed: train.num_steps='ten' must be int" in text
  assert "too_many, too_many_too: model.moe.router" in text
  assert "fine" not in text


@pytest.mark.parametrize(
  "code, message",
  [
    ("x = 1\n", "there is no function get_sweep in it"),
    ("def get_sweep():\n  return {}\n", "returned dict, not a moejax.sweep"),
    ("def get_sweep():\n  return 1 / 0\n", "line 2: ZeroDivisionError"),
    ("def get_sweep(\n", "line 1:"),
  ],
)
def test_files_that_do_not_work(tmp_path, code, message):
  (tmp_path / "sweep.py").write_text(code)
  with pytest.raises(ConfigError, match=message):
    load_sweep(str(tmp_path / "sweep.py"))


def test_the_seed_is_the_sweeps(tmp_path):
  sweep = load_sweep(write(tmp_path, {"a": {}}))
  with pytest.raises(ConfigError, match="give --seeds"):
    plan_runs(sweep, ["--config.seed", "5"])


def test_a_file_without_a_docstring_has_its_name_for_a_title(
  tmp_path, monkeypatch
):
  (tmp_path / "mine.py").write_text(
    "from moejax.sweep import Sweep\n"
    "def get_sweep():\n  return Sweep(config='c.py', points={'a': {}})\n"
  )
  (tmp_path / "c.py").touch()
  monkeypatch.chdir(tmp_path)
  assert load_sweep("mine.py").title == "mine"


def test_a_config_that_is_nowhere_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text(
    "from moejax.sweep import Sweep\n"
    "def get_sweep():\n  return Sweep(config='c.py', points={'a': {}})\n"
  )
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=r"no config 'c.py', neither beside"):
    load_sweep("mine.py")


def test_no_such_file():
  with pytest.raises(ConfigError, match="no sweep file 'nowhere.py'"):
    load_sweep("nowhere.py")
