# SPDX-License-Identifier: Apache-2.0
"""Numbers of a comparison, from logs that were made up."""

import json

import numpy as np
import pytest

from moejax.config import Config
from moejax.errors import DataError
from moejax.metrics import encode_line
from moejax.report.style import new_figure
from moejax.sweep import Sweep
from moejax.sweep.charts import make_charts, spread
from moejax.sweep.compare import compare, mean_and_error
from moejax.sweep.page import write_page
from moejax.sweep.spec import PlannedRun
from moejax.sweep.state import DONE, RunState, write_state
from moejax.sweep.table import (
  as_markdown,
  as_rows,
  as_text,
  columns,
  headline,
)

STEPS = 40
# Final losses by seed: what two routers share goes with the seed.
LOSSES = {"base": [2.0, 3.0, 2.5], "better": [1.9, 2.8, 2.45], "late": [2.2]}


def write_run(folder, config, loss, speed, dropped=0.0):
  folder.mkdir(parents=True)
  record = {
    "config": config.to_dict(), "versions": {}, "git_commit": None,
    "num_params": 100, "num_active_params": 10,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(record))
  with open(folder / "metrics.jsonl", "wb") as f:
    for step in range(1, STEPS + 1):
      f.write(encode_line(step, {
        "loss/xent": loss + 5.0 / step, "router/dropped": dropped,
        "router/max_over_mean": 1.0 + 1.0 / step, "router/unrouted": 0.0,
      }))  # fmt: skip
  with open(folder / "timing.jsonl", "wb") as f:
    for step in range(1, STEPS + 1):
      rate = speed if step > 1 else 1.0  # the first step compiles
      f.write(encode_line(step, {"tokens_per_second": rate}))
  (folder / "eval.jsonl").write_bytes(
    encode_line(STEPS, {"validation/xent": loss, "validation/tokens": 64.0})
  )
  write_state(folder, RunState(DONE, "", 5.0))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
  place = tmp_path_factory.mktemp("compared")
  sweep = Sweep(
    config="x.py", points={name: {} for name in LOSSES}, seeds=(0, 1, 2),
    baseline="base", title="<b>Which</b>?",
  )  # fmt: skip
  config = Config.from_dict(
    {
      "train": {"num_steps": STEPS},
      "optimizer": {"schedule": {"warmup": 1.0}},
    }
  )
  planned = [PlannedRun(n, s, config) for n in LOSSES for s in (0, 1, 2)]
  for name, losses in LOSSES.items():
    for seed, loss in enumerate(losses):
      folder = place / name / f"seed_{seed}"
      write_run(folder, config, loss, 100.0 + seed, 0.25 * (name == "late"))
  return compare(sweep, planned, place), place


def test_means_and_paired_differences(comparison):
  result, _ = comparison
  base, better, late = result.points
  assert result.difference(base)[0] == 0
  mean, error = result.difference(better)
  paired = np.array([-0.1, -0.2, -0.05])
  assert mean == pytest.approx(paired.mean())
  assert error == pytest.approx(paired.std(ddof=1) / np.sqrt(3))
  mean, error = result.difference(late)
  assert mean == pytest.approx(0.2) and np.isnan(error)
  # `late` has the lowest mean, of an easy seed; by seed it is the worst.
  assert [p.name for p in result.ranked()] == ["better", "base", "late"]
  (best,) = [c for c in make_charts(result) if c.name == "final-loss"]
  assert best.title == (
    "Lowest: better, in all 3 seeds; too few to tell it from base"
  )
  # Seeds differ far more than the routers do, which pairing takes out.
  spread_of_seeds = mean_and_error(np.array(LOSSES["better"]))[1]
  assert result.difference(better)[1] < spread_of_seeds / 3


def made_up(place, losses, seeds=(0, 1, 2)):
  """The comparison of points with these losses by seed; None has no run."""
  config = Config.from_dict({
    "train": {"num_steps": STEPS}, "optimizer": {"schedule": {"warmup": 1.0}},
  })  # fmt: skip
  sweep = Sweep(config="x.py", points={n: {} for n in losses}, seeds=seeds)
  planned = [PlannedRun(n, s, config) for n in losses for s in seeds]
  for name, found in losses.items():
    for seed, loss in zip(seeds, found):
      if loss is not None:
        write_run(place / name / f"seed_{seed}", config, loss, 100.0)
  return compare(sweep, planned, place)


def chart(comparison, name):
  """A chart as drawn: its axes, and its title and note."""
  (found,) = [c for c in make_charts(comparison) if c.name == name]
  figure = new_figure(*found.size)
  found.draw(figure, False)
  return figure.axes[0], found


def test_pictures_rank_as_the_table_does_also_with_seeds_missing(tmp_path):
  """An easy seed alone puts no bar further left than that of the best."""
  result = made_up(tmp_path, LOSSES)
  axes, found = chart(result, "final-loss")
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ["better", "base", "late, 1/3 seeds"]
  bars = {}
  for line in axes.lines:
    (x, y) = line.get_data()
    if len(y) == 2 and y[1] - y[0] == pytest.approx(0.6):
      bars[labels[round(y.mean())]] = x[0]
  base = 7.5 / 3
  expected = {
    "better": base - 0.35 / 3, "base": base, "late, 1/3 seeds": base + 0.2
  }  # fmt: skip
  assert bars == pytest.approx(expected)
  assert "Hollow: seeds are missing" in found.note
  axes, found = chart(result, "loss-speed")
  marks = {
    line.get_gid().removeprefix("curve-"): line
    for line in axes.lines if line.get_gid()
  }  # fmt: skip
  places = {name: line.get_ydata()[0] for name, line in marks.items()}
  assert list(places.values()) == pytest.approx(
    [expected["base"], expected["better"], expected["late, 1/3 seeds"]]
  )
  hollow = [n for n, m in marks.items()
            if m.get_markerfacecolor() != m.get_color()]  # fmt: skip
  assert hollow == ["late"]
  assert "Hollow" in found.note
  for text in (as_markdown(result), as_text(result)):
    assert "Sorted by the difference to base, seed by seed" in text


def test_without_missing_seeds_nothing_is_hollow(tmp_path):
  result = made_up(tmp_path, {"a": [2.0, 3.0, 2.5], "b": [2.1, 2.9, 2.0]})
  for point in result.points:
    assert result.placed(point) == pytest.approx(point.loss)
  for name in ("final-loss", "loss-speed"):
    _, found = chart(result, name)
    assert "Hollow" not in found.note


def test_a_point_of_other_seeds_has_no_place_beside_the_others(tmp_path):
  result = made_up(tmp_path, {"a": [2.0, 3.0, None], "b": [None, None, 1.0]})
  assert np.isnan(result.placed(result.point("b")))
  axes, _ = chart(result, "final-loss")
  assert len(axes.get_yticklabels()) == 2
  assert "loss-speed" not in {c.name for c in make_charts(result)}
  assert headline(result) == "Lowest: a; no seed in common with b"


def test_without_a_baseline_the_means_are_compared(tmp_path):
  losses = {"a": [None, None], "b": [2.1, 3.2], "c": [2.0, 3.0]}
  result = made_up(tmp_path, losses, (0, 1))
  assert [p.name for p in result.ranked()] == ["c", "b", "a"]
  assert result.placed(result.point("b")) == pytest.approx(2.65)
  assert "Sorted by final loss, as a has none" in as_text(result)


@pytest.mark.parametrize(
  "losses, title",
  [
    # Of two seeds: 15 standard errors, 3, and one seed the other way.
    ([[2.14, 3.16], [2.0, 3.0]], "b ends lowest, 0.15 below a (± 0.01)"),
    ([[2.0, 3.0], [2.14, 3.16]], "a ends lowest"),
    (
      [[2.1, 3.2], [2.0, 3.0]],
      "Lowest: b, in both seeds; too few to tell it from a",
    ),
    # Far below the baseline, but not below the second.
    (
      [[9.0, 9.0], [2.0, 3.0], [2.1, 2.95]],
      "Lowest: b, not in every seed; too few to tell it from c",
    ),
    # Below the second for sure, but not below the third.
    (
      [[2.0, 3.0], [2.1, 3.101], [1.9, 3.4]],
      "Lowest: a, not in every seed; too few to tell it from c",
    ),
    ([[2.1, None], [2.0, None]], "Lowest: b, in a single seed"),
    ([[2.1, 3.1], [None, None]], "a ends at 2.6"),
  ],
)
def test_the_headline_claims_what_the_numbers_bear(tmp_path, losses, title):
  result = made_up(tmp_path, dict(zip("abc", losses)), (0, 1))
  assert headline(result) == title
  assert chart(result, "final-loss")[1].title == title


def test_a_loss_that_is_not_finite_is_nobodys_else(tmp_path):
  """One run that ends so leaves the others their validation losses."""
  losses = {"a": [2.0, 3.0], "b": [float("nan"), 3.1]}
  result = made_up(tmp_path, losses, (0, 1))
  assert result.validated
  assert result.point("a").loss == pytest.approx(2.5)
  rows = {row[0]: row for row in as_rows(result)}
  assert rows["b"][-1] == "1/2" and rows["b"][1] == "not finite"
  assert headline(result) == "a ends at 2.5"
  assert [point.name for point in result.ranked()] == ["a", "b"]
  result = made_up(tmp_path / "all", {"a": [2.0], "b": [float("nan")]}, (0,))
  rows = {row[0]: row for row in as_rows(result)}
  assert rows["b"][1] == "not finite" and rows["a"][1] == "2.0000"
  assert headline(result) == "a ends at 2"


def test_steps_that_were_not_taken_are_a_column(tmp_path):
  result = made_up(tmp_path, {"a": [2.0], "b": [2.1]}, (0,))
  assert "skipped" not in as_rows(result)[0]
  with open(tmp_path / "b" / "seed_0" / "metrics.jsonl", "wb") as f:
    for step in range(1, STEPS + 1):
      values = {"loss/xent": 2.0, "skipped": float(step in (5, 7))}
      f.write(encode_line(step, values))
  planned = [run.planned for point in result.points for run in point.runs]
  sweep = Sweep(config="x.py", points={"a": {}, "b": {}}, seeds=(0,))
  rows = {row[0]: row for row in as_rows(compare(sweep, planned, tmp_path))}
  with open(tmp_path / "b" / "seed_0" / "metrics.jsonl", "wb") as f:
    for step in range(1, STEPS + 1):
      values = {"loss/xent": 2.0, "skipped": float(step > STEPS - 4)}
      f.write(encode_line(step, values))
  (run,) = compare(sweep, planned, tmp_path).point("b").runs
  assert run.skipped == 4 and np.isnan(run.training_loss)
  place = rows["point"].index("skipped")
  assert rows["a"][place] == "0" and rows["b"][place] == "2"


def test_a_half_done_run_has_no_numbers_beside_the_loss(tmp_path):
  """Its steps so far are of another phase, its first one compiles."""
  result = made_up(tmp_path, {"a": [2.0, 3.0], "b": [2.1, 3.1]}, (0, 1))
  whole = columns(result)
  for seed in (0, 1):
    for log in ("metrics.jsonl", "timing.jsonl"):
      file = tmp_path / "b" / f"seed_{seed}" / log
      file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:1]))
    (tmp_path / "b" / f"seed_{seed}" / "eval.jsonl").unlink()
  planned = [run.planned for point in result.points for run in point.runs]
  sweep = Sweep(config="x.py", points={"a": {}, "b": {}})
  half = compare(sweep, planned, tmp_path)
  rows = {row[0]: row for row in as_rows(half)}
  heads = rows["point"]
  assert [c.key for c in columns(half)] == [c.key for c in whole]
  for name in ("tokens/s", "busiest expert", "final loss"):
    assert rows["b"][heads.index(name)] == "–"
    assert rows["a"][heads.index(name)] != "–"
  assert rows["b"][heads.index("total")] == "100"  # known from the start
  assert rows["b"][-1] == "0/2"


def test_one_kind_of_loss_for_all(tmp_path):
  """A run without an evaluation at its end is not held against others."""
  sweep = Sweep(config="x.py", points={"a": {}, "b": {}}, seeds=(0,))
  config = Config.from_dict({
    "train": {"num_steps": STEPS}, "optimizer": {"schedule": {"warmup": 1.0}},
  })  # fmt: skip
  planned = [PlannedRun(n, 0, config) for n in "ab"]
  for name in "ab":
    write_run(tmp_path / name / "seed_0", config, 2.0, 100.0)
  evaluations = tmp_path / "b" / "seed_0" / "eval.jsonl"
  evaluations.write_bytes(encode_line(5, {"validation/xent": 9.0}))
  result = compare(sweep, planned, tmp_path, ["--config.train.init_from", "x"])
  assert not result.validated
  late = 2.0 + np.mean([5.0 / s for s in range(STEPS - 3, STEPS + 1)])
  for point in result.points:
    assert point.loss == pytest.approx(late, rel=1e-5)
  assert result.common == {"train.init_from": "x"}


def test_a_damaged_log_is_no_missing_one(comparison, tmp_path):
  sweep = Sweep(config="x.py", points={"a": {}}, seeds=(0,))
  config = Config()
  write_run(tmp_path / "a" / "seed_0", config, 2.0, 100.0)
  (tmp_path / "a" / "seed_0" / "config.json").write_text("{")
  with pytest.raises(DataError, match="config.json cannot be read"):
    compare(sweep, [PlannedRun("a", 0, config)], tmp_path)


def test_what_the_table_says(comparison):
  result, _ = comparison
  rows = {row[0]: row for row in as_rows(result)}
  heads = rows["point"]
  assert rows["base"][heads.index("against base")] == "0"
  assert rows["late"][heads.index("dropped")] == "25.0%"
  assert rows["late"][-1] == "1/3" and rows["base"][-1] == "3/3"
  assert rows["base"][heads.index("tokens/s")] == "101"
  # Nothing logged it, or it is all zeros: no column.
  assert "entropy" not in heads and "unrouted" not in heads
  assert "±" in rows["better"][1] and "±" not in rows["late"][1]
  assert as_markdown(result).splitlines()[1].startswith("|---|---:|")
  keys = [c.key for c in columns(result)]
  assert keys.index("loss") < keys.index("difference")


def test_the_page_escapes_and_links_nothing(comparison):
  result, place = comparison
  page = write_page(result, place).read_text()
  assert "<b>Which</b>" not in page and "&lt;b&gt;Which" in page
  assert "Not done" in page and "late/seed_1" in page
  for chart in make_charts(result):
    assert (place / f"{chart.name}.png").stat().st_size > 1000
    assert f'id="{chart.name}"' in page
  assert {c.name for c in make_charts(result)} == {
    "final-loss", "loss-speed", "loss-curves", "difference", "load", "dropped"
  }  # fmt: skip


def test_a_router_that_looks_ahead_is_marked(comparison, tmp_path):
  result, _ = comparison
  model = {"moe": {"router": "expert_choice(k=8, group_size=64)"}}
  config = Config.from_dict({
    "train": {"num_steps": STEPS}, "model": model,
    "optimizer": {"schedule": {"warmup": 1.0}},
  })  # fmt: skip
  write_run(tmp_path / "ahead" / "seed_0", config, 1.0, 9.0)
  sweep = Sweep(config="x.py", points={"ahead": {}}, seeds=(0,))
  found = compare(sweep, [PlannedRun("ahead", 0, config)], tmp_path)
  assert as_rows(found)[1][0] == "ahead*"
  assert "looks at later tokens" in as_markdown(found)
  assert "looks at later tokens" in write_page(found, tmp_path).read_text()
  assert headline(found) == "No point whose loss can be held against others"
  both = Sweep(config="x.py", points={"ahead": {}, "plain": {}}, seeds=(0,))
  plain = Config.from_dict(config.to_dict() | {"model": {}})
  write_run(tmp_path / "plain" / "seed_0", plain, 2.0, 9.0)
  planned = [PlannedRun("ahead", 0, config), PlannedRun("plain", 0, plain)]
  assert headline(compare(both, planned, tmp_path)) == "plain ends at 2"
  assert "later tokens" not in as_markdown(result)


def test_nothing_to_compare(tmp_path):
  sweep = Sweep(config="x.py", points={"a": {}})
  config = Config()
  with pytest.raises(DataError, match="no run with a finished step"):
    compare(sweep, [PlannedRun("a", 0, config)], tmp_path)


@pytest.mark.parametrize(
  "values, gap",
  [
    ([0.0, 1.0, 2.0], 0.5),
    ([1.0, 1.0, 1.0], 0.5),
    ([0.0, 0.1, 0.2, 1.9, 2.0], 0.4),
    ([2.0] * 5, 0.5),
    ([0.0, 0.45, 0.55, 0.9, 1.5], 0.3),
  ],
)
def test_names_keep_apart_and_in_order(values, gap):
  places = spread(np.array(values), gap, 0.0, 2.0)
  assert (np.diff(places) >= gap - 1e-9).all()
  assert places[0] >= -1e-9 and places[-1] <= 2.0 + 1e-9
  if np.diff(values).min() >= gap:
    np.testing.assert_array_equal(places, values)
