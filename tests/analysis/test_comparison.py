# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what names them, how they are compared, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import analysis
from moejax.analysis import lines as lines_of_charts
from moejax.analysis import results, surveys
from moejax.analysis.checkpoints import Checkpoint, names_of
from moejax.checkpoint import StepWriter
from moejax.checkpoint.leaves import describe
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import CheckpointError, ConfigError, DataError, UserError
from moejax.models import Rows, init_variables
from tests.analysis.small_model import K, config_of, make_run, make_texts


def add_step(folder, step, seed):
  """One more checkpoint of the run, with weights of their own."""
  run = analysis.load(folder)
  variables = init_variables(run.model, jax.random.key(seed))
  names = describe(variables)
  writer = StepWriter(folder / "checkpoints", step, names, "a test")
  for name, leaf in zip(names, jax.tree.leaves(variables), strict=True):
    writer.write(name, np.asarray(leaf))
  writer.commit({"step": step, "tokenizer": ByteTokenizer.digest})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A run with steps 1, 3 and 7, and texts."""
  place = tmp_path_factory.mktemp("place")
  make_run(place / "run")
  add_step(place / "run", 7, seed=7)
  add_step(place / "run", 1, seed=0)  # the weights of step 3
  return place


@pytest.fixture
def plan(place):
  return analysis.Plan(make_texts(place / "texts"), batch_size=4)


def steps(found):
  return [checkpoint.step for checkpoint in found]


def test_ways_to_name_a_checkpoint(place):
  run = str(place / "run")
  assert steps(analysis.find([run])) == [7]
  assert steps(analysis.find([f"{run}:3"])) == [3]
  assert steps(analysis.find([f"{run}/3"])) == [3]
  assert steps(analysis.find([f"{run}/checkpoints/3"])) == [3]
  assert steps(analysis.find([f"{run}:all"])) == [1, 3, 7]
  assert steps(analysis.find([run, f"{run}:1", f"{run}/3", run])) == [1, 3, 7]
  assert analysis.load(f"{run}:1").step == 1


def test_saturation_against_a_loop_over_tokens(place, plan):
  """Step 3 has the weights of step 1; step 7 is the last."""
  checkpoints = analysis.find([f"{place}/run:all"])
  result = analysis.saturation(
    analysis.survey_all(checkpoints, plan, str(place))
  )
  assert result.steps_M.tolist() == [1, 3, 7]
  chosen = []
  for checkpoint in checkpoints:
    run = checkpoint.load()
    mine = []
    for _, batch in plan.batches(run.tokenizer, run.config.data):
      rows = Rows(*map(jnp.asarray, (batch["segment_ids"],
                                     batch["positions"])))  # fmt: skip
      made = analysis.choices(run.model, run.variables, batch["tokens"], rows)
      real = np.asarray(batch["segment_ids"]) > 0
      pairs = made.chosen_BTE, made.top_BT
      mine.append([np.asarray(x)[:, real] for x in pairs])
    chosen.append([np.concatenate(x, axis=1) for x in zip(*mine, strict=True)])
  last, last_top = chosen[-1]
  for m, (mine, top) in enumerate(chosen):
    for router in range(4):
      shared = [
        len(set(np.flatnonzero(a)) & set(np.flatnonzero(b))) / K
        for a, b in zip(mine[router], last[router], strict=True)
      ]
      have = result.share_ML[m, router], result.top_share_ML[m, router]
      same = np.mean(top[router] == last_top[router])
      np.testing.assert_allclose(have, [np.mean(shared), same], rtol=1e-12)
  np.testing.assert_array_equal(result.share_ML[2], 1.0)
  assert result.share_ML[0].max() < 0.9
  assert result.names_M == ("step 1", "step 3", "step 7")
  for router in range(4):
    mean = last[router].mean(0) / K  # each expert's share of the last choices
    for m, (mine, _) in enumerate(chosen):
      np.testing.assert_allclose(
        result.chance_ML[m, router], mine[router].mean(0) @ mean, rtol=1e-12
      )


def test_a_checkpoint_is_saturated_with_itself(place, plan):
  same = analysis.find([f"{place}/run:1", f"{place}/run:3"])
  result = analysis.saturation(analysis.survey_all(same, plan, None))
  np.testing.assert_array_equal(result.share_ML, 1.0)
  np.testing.assert_array_equal(result.top_share_ML, 1.0)


@pytest.mark.parametrize("data", [{"seq_len": 16}, {"text_key": "title"}])
def test_all_runs_read_the_text_as_the_last_one_does(tmp_path, data):
  """Equal weights are saturated, whatever text their run was trained on."""
  lines = [
    {"text": f"{i} is the number of cats that sat on the mat, and no hat. " * 3,
     "title": f"def f{i}(x): return [x + 1 for _ in range({i})] " * 2}
    for i in range(40)
  ]  # fmt: skip
  (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
  make_run(tmp_path / "last")
  make_run(tmp_path / "first", data=data)
  found = analysis.find([str(tmp_path / name) for name in ("first", "last")])
  plan = analysis.Plan({"lines": [str(tmp_path / "lines.jsonl")]}, tokens=2000)
  both = analysis.survey_all(found, plan, None)
  assert both[0].total.tokens == both[1].total.tokens > 1900
  result = analysis.saturation(both)
  np.testing.assert_array_equal(result.share_ML, 1.0)
  np.testing.assert_array_equal(result.top_share_ML, 1.0)
  # Of several runs the step says nothing: here both are at the same.
  assert result.names_M == ("first", "last")
  title = lines_of_charts.saturation_chart(result).title
  assert title == "100\u00a0% of the routing of last is already that of first"
  for found in (result, analysis.expert_load(both), analysis.entropy(both)):
    table = results.columns(found)
    assert set(table["checkpoint"]) == {"first", "last"}
    assert len(set(table["step"])) == 1
    figure = analysis.draw(found)  # with their names for steps
    said = {t.get_text() for ax in figure.axes for t in ax.get_xticklabels()}
    assert ("first" in said) == (found is result)


def test_names_of_checkpoints():
  one, other = Path("a/x"), Path("b/x")
  at = lambda folder, step: Checkpoint(folder, step)
  assert names_of([at(one, 1), at(one, 1000)]) == ["step 1", "step 1,000"]
  assert names_of([at(one, 1), at(other, 1)]) == ["a/x", "b/x"]
  both = [at(one, 1), at(one, 3), at(Path("b/seed_0"), 1)]
  assert names_of(both) == ["x, step 1", "x, step 3", "b/seed_0"]


@pytest.mark.parametrize(
  "other", [{"batch_size": 3}, {"tokens": 640}, {"tokens": 2560}]
)
def test_surveys_of_other_batches_are_not_compared(place, other):
  """Of another shape, fewer, more."""
  texts = make_texts(place / "texts")
  plan = analysis.Plan(texts, batch_size=4, tokens=1280)
  run = analysis.load(f"{place}/run:1")
  with surveys.ChoiceFile() as kept:
    analysis.survey(run, plan, keep=kept, words=False)
    analysis.survey(run, plan, against=kept, words=False)
    changed = dataclasses.replace(plan, **other)
    with pytest.raises(ConfigError, match="step 1 read other batches than the"):
      analysis.survey(run, changed, against=kept, words=False)


def test_runs_of_one_model_keep_their_order(place, tmp_path):
  shutil.copytree(place / "run", tmp_path / "other")
  found = analysis.find([f"{place}/run:7", str(tmp_path / "other/3")])
  assert steps(found) == [7, 3]


def test_what_cannot_be_compared_or_found(place, tmp_path):
  run = str(place / "run")
  for name, message in (
    (f"{run}:5", r"no checkpoint of step 5 in .*run; available steps: 1, 3, 7"),
    (f"{run}/5", r"no checkpoint of step 5 in .*available steps: 1, 3, 7"),
  ):
    with pytest.raises(CheckpointError, match=message):
      analysis.find([name])
  no_numbers = [f"{run}{x}" for x in (":\u00b2", "/\u00b2", ":\u0663")]
  for name in (f"{run}x", f"{run}x:3", f"{run}x:all", str(place), *no_numbers):
    with pytest.raises(DataError, match="is not the folder of a run"):
      analysis.find([name])
  make_run(tmp_path / "deep", num_layers=2)
  with pytest.raises(
    ConfigError, match=r"different models \(model.num_layers: 3 -> 2\)"
  ):
    analysis.find([run, str(tmp_path / "deep")])
  dense = tmp_path / "dense"
  make_run(dense, pattern=("attention/mlp",), num_heads=2)
  with pytest.raises(ConfigError, match="dense has no MoE layer, so there is"):
    analysis.find([str(dense)])
  words = tmp_path / "words"
  shutil.copytree(place / "run", words)
  write_other_tokenizer(words)
  with pytest.raises(UserError, match="have different tokenizers"):
    analysis.find([run, str(words)])


def write_other_tokenizer(folder):
  from moejax.data import train_tokenizer

  (folder / "tokenizer.json").unlink()
  train_tokenizer(["the cat sat on the mat " * 9], 262, folder)


def test_how_a_model_is_computed_is_no_difference(place, tmp_path):
  make_run(tmp_path / "apart", scan_layers=False)
  found = analysis.find([str(place / "run"), str(tmp_path / "apart")])
  assert len(found) == 2
  assert config_of().model.scan_layers
