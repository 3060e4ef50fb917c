# SPDX-License-Identifier: Apache-2.0
"""Numbers of a comparison, from logs that were made up."""

import json

import numpy as np
import pytest

from moejax.config import Config
from moejax.errors import DataError
from moejax.metrics import encode_line
from moejax.sweep import Sweep
from moejax.sweep.charts import make_charts, spread
from moejax.sweep.compare import compare, mean_and_error
from moejax.sweep.page import write_page
from moejax.sweep.spec import PlannedRun
from moejax.sweep.state import DONE, RunState, write_state
from moejax.sweep.table import as_markdown, as_rows, columns

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
    encode_line(STEPS, {"validation/xent": loss})
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
  assert best.title == "better ends lowest, 0.117 below base (± 0.0441)"
  # Seeds differ far more than the routers do, which pairing takes out.
  spread_of_seeds = mean_and_error(np.array(LOSSES["better"]))[1]
  assert result.difference(better)[1] < spread_of_seeds / 3


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
