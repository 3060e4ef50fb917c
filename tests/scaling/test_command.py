# SPDX-License-Identifier: Apache-2.0
"""`moejax scaling`, from points to pictures."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from moejax import cli
from moejax.__main__ import main
from moejax.config import Config
from moejax.scaling import (
  CHINCHILLA_REFITTED,
  SIX_ND,
  fit_points,
  optima,
  plan_points,
)
from moejax.scaling.charts import power_law_chart
from moejax.scaling.points import to_csv
from moejax.scaling.sweep_file import write_sweep
from moejax.sweep.spec import load_sweep, plan_runs
from tests.report.synthetic import Recipe, write_run
from tests.scaling.synthetic import points_of, shaky_points, take

CONFIGS = Path(__file__).parents[2] / "configs"
LAW = CHINCHILLA_REFITTED
PICTURES = {"isoflop", "power_laws", "loss_surface", "residuals"}


def write_table(folder, points):
  path = folder / "points.csv"
  path.write_text(to_csv(points))
  return str(path)


def fit(tmp_path, points, *args):
  table = write_table(tmp_path, points)
  out = tmp_path / "out"
  command = [
    "scaling",
    "fit",
    table,
    f"--output={out}",
    "--resamples=20",
    *args,
  ]
  return main(command), out


def test_a_fit_end_to_end(tmp_path, capsys):
  code, out = fit(tmp_path, points_of(LAW, noise=1e-3), "--budget=5e19,1e22")
  assert code == 0
  record = json.loads((out / "fit.json").read_text())
  for near, budget in zip(record["budgets"], (5e19, 1e22)):
    params, tokens = LAW.optimum(budget)
    assert near["flops"] == budget
    for found in near["optima"][:2]:
      for name, true in (("params", params), ("tokens", tokens)):
        value, low, high = (found[name][x] for x in ("value", "low", "high"))
        assert value == pytest.approx(true, rel=0.03)
        assert low < value < high < 1.5 * low
    assert [row["method"] for row in near["optima"]] == [
      "isoflop", "parametric", "hunyuan_large", "chinchilla",
      "chinchilla_refitted",
    ]  # fmt: skip
  for near, beyond in zip(record["budgets"], (1, 100)):
    assert [row["beyond"] for row in near["optima"]] == [
      pytest.approx(beyond), pytest.approx(beyond), None, None, None,
    ]  # fmt: skip
  assert record["problems"] == []
  (note,) = record["notes"]
  assert "parabolas would put N_opt" in note
  assert {path.stem for path in out.glob("*.png")} == PICTURES
  for path in out.glob("*.png"):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1200
    assert pixels[::4, ::4, 0].std() > 0.05
  assert (out / "points.csv").read_text() == (
    tmp_path / "points.csv"
  ).read_text()
  told = capsys.readouterr().out
  ends = [x.split()[-2:] for x in told.splitlines() if "IsoFLOP valleys" in x]
  assert ends[0][-1] == "no" and ends[1] == ["100x", "above"]
  assert max(map(len, told.splitlines())) <= 92


def test_the_same_points_give_the_same_bytes(tmp_path):
  points = points_of(LAW, sizes=3, noise=1e-3)
  _, out = fit(tmp_path, points)
  first = (out / "fit.json").read_bytes()
  (out / "fit.json").unlink()
  fit(tmp_path, points)
  assert (out / "fit.json").read_bytes() == first


def test_a_valley_outside_is_told(tmp_path, capsys):
  points = take(points_of(LAW), np.arange(4, 35))
  code, out = fit(tmp_path, points)
  assert code == 0
  assert "valley below the smallest size tried" in capsys.readouterr().out
  first = json.loads((out / "fit.json").read_text())["isoflop"]["valleys"][0]
  assert first["params"] is None


def test_valleys_reach_no_further_than_those_that_are_used(tmp_path, capsys):
  """The largest budget of five has small models only, and so no valley."""
  points = take(points_of(LAW), np.arange(31))
  code, out = fit(tmp_path, points, "--budget=1e17,1e20")
  assert code == 0
  record = json.loads((out / "fit.json").read_text())
  low, high = record["budgets"]
  assert low["optima"][0]["beyond"] == pytest.approx(0.1)
  assert low["optima"][1]["beyond"] == pytest.approx(0.1)
  assert high["optima"][0]["beyond"] == pytest.approx(1e20 / 3e19)
  assert high["optima"][1]["beyond"] == 1
  told = capsys.readouterr().out
  rows = [x for x in told.splitlines() if x.startswith("  IsoFLOP valleys")]
  assert rows[0].endswith("10x below") and rows[1].endswith("3.33x above")
  rows = [x for x in told.splitlines() if x.startswith("  parametric loss")]
  assert rows[0].endswith("10x below") and rows[1].endswith(" no")


def test_few_resamples_with_valleys_end_in_a_note(tmp_path, capsys):
  points = shaky_points(np.geomspace(1e18, 1e20, 9))
  code, out = fit(tmp_path, points, "--budget=1e18")
  assert code == 0
  told = " ".join(capsys.readouterr().out.split())
  assert "of 20 resamples had a budget without a valley, so they have" in told
  assert "three sizes a budget" not in told
  isoflop = json.loads((out / "fit.json").read_text())["isoflop"]
  assert isoflop["params_opt"]["exponent"]["low"] is None
  assert isoflop["failed_resamples"] > 10
  assert (out / "power_laws.png").is_file()


def test_published_laws_count_embedding_tables(tmp_path, capsys):
  """So they are not told beside a count without."""
  points, budget = points_of(LAW, noise=1e-3), "--budget=1e19"
  (tmp_path / "points.csv").write_text(to_csv(points, "non-embedding"))
  out = tmp_path / "out"
  assert main([
    "scaling", "fit", str(tmp_path / "points.csv"), f"--output={out}",
    "--resamples=2e1", budget, "--count=non-embedding",
  ]) == 0  # fmt: skip
  told = capsys.readouterr().out
  assert "Hunyuan" not in told and "Chinchilla" not in told
  assert "note: published laws count N with embedding tables" in told
  record = json.loads((out / "fit.json").read_text())
  assert [row["method"] for row in record["budgets"][0]["optima"]] == [
    "isoflop", "parametric",
  ]  # fmt: skip
  without = fit_points(points, "non-embedding", resamples=20)
  for case, there in (
    (without, False),
    (fit_points(points, resamples=20), True),
  ):
    chart = power_law_chart(case, [1e19])
    figure = Figure()
    chart.draw(figure, False)
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert ("Hunyuan-Large" in labels) == there
    assert ("published laws" in chart.note) == there


def test_without_budgets_the_parametric_law_remains(tmp_path, capsys):
  """And the other way round: three sizes at two budgets have valleys only."""
  points = points_of(LAW, np.geomspace(1e18, 1e20, 12), sizes=1)
  params = points.params * np.tile([0.5, 1, 2], 4)
  wider = type(points)(
    points.names, params, points.tokens, SIX_ND.flops(params, points.tokens),
    LAW(params, points.tokens),
  )  # fmt: skip
  code, out = fit(tmp_path, wider)
  assert code == 0
  told = capsys.readouterr().out
  assert "note: not fitted: IsoFLOP fit: 0 of" in told
  assert {p.stem for p in out.glob("*.png")} == {"loss_surface", "residuals"}

  few = points_of(LAW, (1e18, 1e19), sizes=3)
  code, out = fit(tmp_path, few, "--budget=1e19")
  assert code == 0
  told = capsys.readouterr().out
  assert "note: not fitted: parametric fit: 6 points" in told
  assert "two valleys give a line" in told
  assert "no interval of the valleys" in told


def test_too_few_points_are_one_line(tmp_path, capsys):
  code, out = fit(tmp_path, points_of(LAW, (1e18,), sizes=3))
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert code == 2
  assert "1 of 1 budgets" in error and "3 points of 3 sizes" in error
  assert not out.exists()


@pytest.mark.parametrize("budget", ["1e19,x", "-1", "inf", ","])
def test_a_budget_that_is_none(tmp_path, budget, capsys):
  with pytest.raises(SystemExit):
    fit(tmp_path, points_of(LAW), f"--budget={budget}")
  assert "--budget" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
  (tmp_path / "out").write_text("a file")
  code, _ = fit(tmp_path, points_of(LAW))
  assert code == 2
  assert "cannot write to" in capsys.readouterr().err


def test_folders_of_runs(tmp_path, capsys):
  """Of one size and length there is nothing to fit, but they are read."""
  runs = []
  for name in "abc":
    recipe = Recipe(luck=0.01 * len(runs))
    runs.append(str(write_run(tmp_path / name, recipe)))
  assert main(["scaling", "fit", *runs, f"--output={tmp_path / 'out'}"]) == 2
  assert "3 points of 1 sizes" in capsys.readouterr().err


PLAN = [
  "scaling", "points", f"--config={CONFIGS / 'tiny.py'}",
  "--budgets=1e13,3e13", "--sizes=2e5,4e5,8e5",
]  # fmt: skip


def test_the_planned_points_are_what_a_sweep_runs(
  tmp_path, capsys, monkeypatch
):
  """Options of the command line too; whatever the working directory is."""
  path = tmp_path / "study" / "sweep.py"
  path.parent.mkdir()
  extra = [
    "--config.train.batch_size=4", "--config.eval.every=0", "--config.seed=3",
    "--config.model.moe.router=top_k(k=3, score='sigmoid')",
    "--config.data.sources=a.txt,b.txt", "--config.data.weights=0.25,0.75",
  ]  # fmt: skip
  assert main([*PLAN, f"--write={path}", *extra]) == 0
  told = capsys.readouterr().out
  assert "6 runs, 1.2e+14 FLOPs together" in told
  assert f"moejax sweep --sweep={path}" in told
  config = cli.parse_config(str(CONFIGS / "tiny.py"), extra)
  wanted = plan_points(config, [1e13, 3e13], [2e5, 4e5, 8e5])
  monkeypatch.chdir(tmp_path)
  planned = plan_runs(load_sweep("study/sweep.py"))
  assert [run.name for run in planned] == [f"{p.name}/seed_3" for p in wanted]
  assert [run.config for run in planned] == [p.config for p in wanted]
  for point in wanted:
    row = next(x for x in told.splitlines() if x.startswith(point.name))
    assert str(point.steps) in row.split()
  text = path.read_text()
  assert text.startswith('# SPDX-License-Identifier: Apache-2.0\n"""IsoFLOP')
  assert max(map(len, text.splitlines())) <= 80

  command = ["sweep", "--dry-run", f"--sweep={path}", f"--workdir={tmp_path}/w"]
  assert main(command) == 0
  listed = capsys.readouterr().out
  assert "IsoFLOP points of tiny.py: 3 sizes x 2 budgets" in listed
  assert "6 points, 6 runs" in listed
  assert all(f"{p.name}/seed_3" in listed for p in wanted)


def test_a_config_is_found_from_a_folder_behind_a_link(tmp_path):
  """`link/..` is where the link leads to."""
  deep = tmp_path / "a" / "b" / "c"
  deep.mkdir(parents=True)
  (tmp_path / "link").symlink_to(deep)
  (tmp_path / "my.py").write_text(
    "from moejax.config import default_config\n\n\ndef get_config(size):\n"
    "  assert size == 'small'\n  return default_config()\n"
  )
  path = tmp_path / "link" / "sweep.py"
  points = plan_points(Config(), [1e20], [1e9])
  write_sweep(path, points, str(tmp_path / "my.py:small"), [])
  (run,) = plan_runs(load_sweep(str(path)))
  assert run.config == points[0].config


def test_where_a_sweep_cannot_be_written(tmp_path, capsys):
  (tmp_path / "mine.py").write_text("# work of a day")
  for name, said in (
    ("points.json", "moejax sweep reads Python; use points.py"),
    ("mine.py", "is there already"),
    ("none/sweep.py", "cannot write"),
  ):
    assert main([*PLAN, f"--write={tmp_path / name}"]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
  assert (tmp_path / "mine.py").read_text() == "# work of a day"


def test_a_size_that_is_no_likeness_is_told(capsys):
  """Tables take nearly all of it: three layers of width 8."""
  command = ["scaling", "points", f"--config={CONFIGS / 'tiny.py'}"]
  assert main([*command, "--budgets=1e12,2e12", "--sizes=1.1e4,4e5"]) == 0
  notes = [x for x in capsys.readouterr().out.splitlines() if "note" in x]
  assert len(notes) == 1
  assert notes[0].startswith("note: c1e12-n9.78e3 and all of its size have")


def test_columns_of_the_planned_points_are_apart(capsys):
  """Also where D is 1,000 times N and more, which is told as a count."""
  command = ["scaling", "points", f"--config={CONFIGS / 'tiny.py'}"]
  assert main([*command, "--budgets=1e13,1e16", "--sizes=2e5,8e5"]) == 0
  head, *rows = capsys.readouterr().out.splitlines()[:5]
  config = cli.parse_config(str(CONFIGS / "tiny.py"), [])
  columns = re.split(r"  +", head)
  for row, point in zip(
    rows, plan_points(config, [1e13, 1e16], [2e5, 8e5]), strict=True
  ):
    cells = row.split()
    assert len(cells) == len(columns) and len(row) == len(head)
    ratio = point.tokens / point.active_params
    told = cells[columns.index("D/N")]
    assert told.endswith("k") == (ratio >= 1000) and "e+" not in told
    assert float(told.rstrip("k")) == pytest.approx(
      ratio / (1000 if ratio >= 1000 else 1), rel=5e-3
    )
  assert any("k" in row.split()[columns.index("D/N")] for row in rows)


def test_flops_by_three_counts(capsys):
  """Hunyuan-Large: 51.3B active parameters, by 6 N and by its own formula."""
  assert (
    main(["scaling", "flops", f"--config={CONFIGS / 'hunyuan_large.py'}"]) == 0
  )
  rows = capsys.readouterr().out.splitlines()
  numbers = {row[:22].strip(): row[22:].split() for row in rows[2:]}
  active = 51_318_800_640
  assert float(numbers["6 N D"][0]) == pytest.approx(6 * active, rel=1e-3)
  assert float(numbers["9.59 N D + 2.3e8 D"][0]) == pytest.approx(
    9.59 * active + 2.3e8, rel=1e-3
  )
  assert float(numbers["the config's own"][2]) == 1


@pytest.mark.parametrize("words", [[], ["fit"], ["points"], ["flops"]])
def test_help(words, capsys):
  with pytest.raises(SystemExit) as caught:
    main(["scaling", *words, "--help"])
  assert caught.value.code == 0
  assert "usage: moejax scaling" in capsys.readouterr().out


def test_from_a_notebook():
  fit = fit_points(points_of(LAW), resamples=20)
  isoflop, parametric, *_ = optima(fit, 1e20)
  assert isoflop.params.value == pytest.approx(LAW.optimum(1e20)[0], rel=0.03)
  assert parametric.params.value == pytest.approx(
    LAW.optimum(1e20)[0], rel=1e-5
  )
  assert parametric.loss.value == pytest.approx(
    LAW(*LAW.optimum(1e20)), rel=1e-6
  )
