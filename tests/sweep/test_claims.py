# SPDX-License-Identifier: Apache-2.0
"""What a comparison claims, and what it does not compare."""

import numpy as np
import pytest

from moejax.config import Config
from moejax.metrics import encode_line
from moejax.sweep import Sweep
from moejax.sweep.compare import compare
from moejax.sweep.page import write_page
from moejax.sweep.spec import PlannedRun
from moejax.sweep.table import as_markdown, headline, is_above_zero
from tests.sweep.test_compare import STEPS, chart, write_run


@pytest.mark.parametrize("seeds", [2, 3])
def test_chance_wins_in_one_case_of_twenty(seeds):
  """Two points that are alike, the lower one of which is looked at."""
  rng = np.random.default_rng(seeds)
  trials = rng.normal(size=(4000, seeds))
  named = sum(is_above_zero(np.sign(x.mean()) * x) for x in trials)
  assert 0.035 < named / len(trials) < 0.065


def test_losses_on_other_text_are_not_compared(tmp_path):
  plain = {"train": {"num_steps": STEPS},
           "optimizer": {"schedule": {"warmup": 1.0}}}  # fmt: skip
  configs = {
    "base": Config.from_dict(plain),
    "other": Config.from_dict(plain | {"data": {"sources": ("other",)}}),
    "longer": Config.from_dict(plain),
  }
  planned = [PlannedRun(n, 0, config) for n, config in configs.items()]
  for name, loss in (("base", 2.0), ("other", 1.0), ("longer", 1.5)):
    write_run(tmp_path / name / "seed_0", configs[name], loss, 100.0)
  (tmp_path / "longer" / "seed_0" / "eval.jsonl").write_bytes(
    encode_line(STEPS, {"validation/xent": 1.5, "validation/tokens": 128.0})
  )
  sweep = Sweep(config="x.py", points={n: {} for n in configs}, seeds=(0,))
  result = compare(sweep, planned, tmp_path)
  assert np.isnan(result.difference(result.point("other"))[0])
  assert headline(result) == "base ends at 2"
  assert result.ranked()[0].name == "base"
  said = as_markdown(result)
  assert "other has another data.sources" in said
  assert "longer was validated on 128 tokens, not 64" in said
  axes, _ = chart(result, "loss-curves")
  assert [line.get_gid() for line in axes.lines] == ["curve-base"]


def test_a_look_ahead_is_starred_in_pictures_too(tmp_path):
  plain = {"train": {"num_steps": STEPS},
           "optimizer": {"schedule": {"warmup": 1.0}}}  # fmt: skip
  routers = {"fair": "top_k(k=2)", "ahead": "expert_choice(k=2, group_size=16)"}
  configs = {
    name: Config.from_dict(plain | {"model": {"moe": {"router": router}}})
    for name, router in routers.items()
  }
  for name, loss in (("fair", 2.0), ("ahead", 1.0)):
    write_run(tmp_path / name / "seed_0", configs[name], loss, 100.0)
  sweep = Sweep(config="x.py", points={n: {} for n in configs}, seeds=(0,))
  planned = [PlannedRun(n, 0, config) for n, config in configs.items()]
  result = compare(sweep, planned, tmp_path)
  for name in ("loss-curves", "difference", "loss-speed", "final-loss"):
    axes, found = chart(result, name)
    said = {text.get_text() for text in (*axes.texts, *axes.get_yticklabels())}
    assert "ahead*" in said and "ahead" not in said
    assert "A star: its router looks at later tokens." in found.note


def losses_of(place, base, other):
  """A comparison of two training losses, [S] each."""
  config = Config.from_dict({
    "train": {"num_steps": len(base)},
    "optimizer": {"schedule": {"warmup": 1.0}},
  })  # fmt: skip
  for name, values in (("base", base), ("other", other)):
    write_run(place / name / "seed_0", config, 2.0, 100.0)
    with open(place / name / "seed_0" / "metrics.jsonl", "wb") as f:
      for step, loss in enumerate(values, 1):
        f.write(encode_line(step, {"loss/xent": loss}))
  sweep = Sweep(config="x.py", points={"base": {}, "other": {}}, seeds=(0,))
  planned = [PlannedRun(name, 0, config) for name in ("base", "other")]
  return compare(sweep, planned, place)


def test_a_skipped_spike_is_no_loss(tmp_path):
  """At the baseline's end, where its own steps are held against it."""
  base = 2 + 50 / np.arange(1, 201)
  base[195] = 1e6
  losses_of(tmp_path, base, base)
  for name in ("base", "other"):
    with open(tmp_path / name / "seed_0" / "metrics.jsonl", "wb") as f:
      for step, loss in enumerate(base, 1):
        skipped = float(loss > 1e5)
        f.write(encode_line(step, {"loss/xent": loss, "skipped": skipped}))
  config = Config.from_dict({
    "train": {"num_steps": 200}, "optimizer": {"schedule": {"warmup": 1.0}},
  })  # fmt: skip
  sweep = Sweep(config="x.py", points={"base": {}, "other": {}}, seeds=(0,))
  planned = [PlannedRun(name, 0, config) for name in ("base", "other")]
  result = compare(sweep, planned, tmp_path)
  assert result.steps_to_equal(result.point("base")) == 1.0


def test_a_little_worse_is_rarely_equal(tmp_path):
  """0.01 nats in noise of 0.02, as in runs of this size."""
  rng = np.random.default_rng(0)
  reached = 0
  for trial in range(40):
    base = 2 + 50 / np.arange(1, 201) + rng.normal(0, 0.02, 200)
    other = base + 0.01 + rng.normal(0, 0.02, 200)
    result = losses_of(tmp_path / str(trial), base, other)
    reached += np.isfinite(result.steps_to_equal(result.point("other")))
  assert reached <= 6


def test_equal_after_the_last_step_above(tmp_path):
  """By a loop over running means of a tenth of the run."""
  steps = np.arange(1, 201)
  base, other = 2 + 50 / steps, 1.8 + 50 / steps
  other[100:120] += 1.0  # a bump, after which it is down again
  result = losses_of(tmp_path, base, other)
  wanted, first = base[-20:].mean(), None
  for step in range(20, 201):
    if other[step - 20 : step].mean() <= wanted:
      first = first or step
    else:
      first = None
  assert first > 120
  assert result.steps_to_equal(result.point("other")) == first / 200
  assert result.steps_to_equal(result.point("base")) == 1.0
  worse = losses_of(tmp_path / "worse", base, base + 0.1)
  assert np.isnan(worse.steps_to_equal(worse.point("other")))


def test_equal_losses_have_no_winner(tmp_path):
  loss = 2 + 50 / np.arange(1, 101)
  result = losses_of(tmp_path, loss, loss)
  assert headline(result) == "base and other end at the same loss"


def test_a_point_that_diverged_is_said_to_be_left_out(tmp_path):
  loss = 2 + 50 / np.arange(1, 101)
  lost = np.where(loss < 2.6, np.nan, loss)
  result = losses_of(tmp_path, loss, lost)
  said = as_markdown(result)
  assert "other ended with a loss that is not finite" in said
  page = write_page(result, tmp_path).read_text()
  assert "1 with a loss that is not finite" in page and "x.py" in page


def test_a_diverged_point_is_never_equal(tmp_path):
  loss = 2 + 50 / np.arange(1, 101)
  lost = np.where(loss < 2.6, np.nan, loss - 1)
  result = losses_of(tmp_path / "point", loss, lost)
  assert np.isnan(result.steps_to_equal(result.point("other")))
  result = losses_of(tmp_path / "base", lost, loss)
  assert np.isnan(result.steps_to_equal(result.point("other")))


def test_training_losses_of_another_mixture_are_not_compared(tmp_path):
  """Easier text in training is no better model; the held-out text is one."""
  plain = {
    "train": {"num_steps": STEPS},
    "optimizer": {"schedule": {"warmup": 1.0}},
    "data": {"sources": ("a", "b"), "weights": (1.0, 1.0)},
  }
  easier = {"data.weights": (1.0, 9.0)}
  late = [
    {"name": "first", "steps": STEPS // 2, "options": {}},
    {"name": "then", "options": easier},
  ]
  same = [
    {"name": "first", "steps": STEPS // 2, "options": {}},
    {"name": "then", "options": {"optimizer.learning_rate": 1e-4}},
  ]
  data = plain["data"]
  configs = {
    "base": plain,
    "easier": plain | {"data": data | {"weights": (1.0, 9.0)}},
    "late": plain | {"train": plain["train"] | {"phases": late}},
    "same": plain | {"train": plain["train"] | {"phases": same}},
  }
  configs = {name: Config.from_dict(c) for name, c in configs.items()}
  planned = [PlannedRun(n, 0, config) for n, config in configs.items()]
  for name, loss in zip(configs, (2.0, 1.0, 1.5, 1.9)):
    write_run(tmp_path / name / "seed_0", configs[name], loss, 100.0)
    (tmp_path / name / "seed_0" / "eval.jsonl").write_bytes(
      encode_line(STEPS, {"validation/xent": 2.0, "validation/tokens": 64.0})
    )
  sweep = Sweep(config="x.py", points={n: {} for n in configs}, seeds=(0,))
  result = compare(sweep, planned, tmp_path)
  equal = {p.name: result.steps_to_equal(p) for p in result.points}
  assert np.isnan(equal["easier"]) and np.isnan(equal["late"])
  assert equal["same"] < 1.0 == equal["base"]
  assert result.difference(result.point("easier"))[0] == 0
  said = as_markdown(result)
  why = "was trained with other data.weights"
  assert f"Training losses not compared: easier {why}; late {why}." in said
  for name, shown in (
    ("loss-curves", {"base", "same"}), ("difference", {"same"}),
  ):  # fmt: skip
    axes, _ = chart(result, name)
    found = {str(line.get_gid()) for line in axes.lines}
    assert {f"curve-{n}" for n in configs} & found == {
      f"curve-{n}" for n in shown
    }
