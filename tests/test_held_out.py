# SPDX-License-Identifier: Apache-2.0
"""Evaluation in training: further sets and tasks, each at its own interval."""

import json

import pytest

from moejax.__main__ import main
from moejax.cli import parse_config
from moejax.evaluate import evaluate_batches, validation_batches
from moejax.runs import load_run
from moejax.train import train
from tests.small_run import make_place
from tests.test_train import lines

TASKS = """
def length(run, *, times=1.0):
  return {"bytes": times * run.tokenizer.vocab_size, "step": run.step}

def raising(run, *, at):
  if run.step == at:
    raise KeyError("what a task may raise")
  return {"fine": 1}

def wrong(run):
  return {"x": "many"}
"""
SETS = [
  {"name": "numbers", "data": ["numbers"], "every": 4, "num_batches": 2},
  {"name": "length", "task": "my_tasks.length(times=2.0)"},
]
OPTIONS = [
  "--config.train.num_steps=10", "--config.optimizer.schedule.decay=0",
  "--config.eval.every=5", "--config.eval.sample_tokens=0",
  "--config.data.sources=text,numbers", "--config.data.weights=3,1",
]  # fmt: skip


def options(sets):
  return [*OPTIONS, f"--config.eval.sets={json.dumps(sets)}"]


def config_of(sets, *more):
  return parse_config("config.py", [*options(sets), *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("held_out"))
  (place / "numbers").mkdir()
  for i in range(30):
    text = " ".join(str(j * i) for j in range(40))
    (place / "numbers" / f"{i}.txt").write_text(text)
  (place / "my_tasks.py").write_text(TASKS)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    patch.syspath_prepend(str(place))
    assert main(["data", "prepare", "--config=config.py", *options(SETS)]) == 0
    assert train(config_of(SETS), "run", report=False) == 0
    yield place


@pytest.fixture(autouse=True)
def within(place, monkeypatch):
  monkeypatch.chdir(place)


def test_each_at_its_own_interval(place):
  found = map(json.loads, lines(place / "run", "eval.jsonl"))
  rows = {row["step"]: row for row in found}
  assert list(rows) == [4, 5, 8, 10]
  assert "validation/xent" not in rows[4]
  assert rows[4]["validation/numbers/xent"] > 0
  assert "validation/numbers/xent" not in rows[5]
  assert rows[5]["validation/length/bytes"] == 2 * 259
  assert rows[10]["validation/length/step"] == 10
  assert set(rows[10]) > {
    "validation/xent", "validation/numbers/bits_per_byte",
    "validation/sources/text/xent", "validation/sources/numbers/bits_per_byte",
  }  # fmt: skip


def test_the_numbers_are_those_of_an_evaluation(place):
  """By itself, and the sources' against batches of one alone."""
  row = json.loads(lines(place / "run", "eval.jsonl")[-1])
  run = load_run("run")
  config = run.config
  from moejax.data import held_out_data, open_stores

  stores = open_stores(
    held_out_data(config.data, config.eval.sets[0]), run.tokenizer
  )
  batches = validation_batches(config, run.model, stores, 2, "train")
  values = evaluate_batches(
    config, run.model, run.variables, batches, run.tokenizer
  )
  for key in ("xent", "bits_per_byte", "tokens"):
    assert row[f"validation/numbers/{key}"] == pytest.approx(values[key], 1e-6)
  stores = open_stores(config.data, run.tokenizer)
  for number, name in enumerate(("text", "numbers")):
    batches = []
    for batch in validation_batches(config, run.model, stores, 2):
      own = batch["source_ids"] == number
      batches.append(batch | {"loss_mask": batch["loss_mask"] & own})
    values = evaluate_batches(
      config, run.model, run.variables, batches, run.tokenizer
    )
    for key in ("xent", "bits_per_byte"):
      assert row[f"validation/sources/{name}/{key}"] == pytest.approx(
        values[key], 1e-6
      )


def test_sources_of_the_training_rows(place):
  rows = [json.loads(line) for line in lines(place / "run")]
  for row in rows:
    parts = {
      name: row[f"sources/{name}/tokens"] for name in ("text", "numbers")
    }
    assert sum(parts.values()) == row["tokens"]
  before = dict.fromkeys(("text", "numbers"), 0)
  before_all = 0
  for row in rows:
    total = sum(
      row[f"sources/{name}/xent"]
      * (row[f"sources/{name}/tokens"] - before[name])
      for name in before
      if row[f"sources/{name}/tokens"] > before[name]
    )
    count = row["tokens"] - before_all
    assert total / count == pytest.approx(row["loss/xent"], rel=1e-5)
    before = {name: row[f"sources/{name}/tokens"] for name in before}
    before_all = row["tokens"]


def test_counts_go_on_after_a_stop(place):
  assert train(config_of(SETS, "--config.train.num_steps=6"), "stopped",
               report=False) == 0  # fmt: skip
  assert train(config_of(SETS), "stopped", report=False) == 0
  assert lines(place / "stopped") == lines(place / "run")


RAISING = [{"name": "bad", "task": "my_tasks.raising(at=3)", "every": 1}]


def test_a_task_that_raises_is_noted(place, capsys):
  assert train(config_of(RAISING), "noted", report=False) == 0
  said = capsys.readouterr().out
  assert "step 3: task bad raised KeyError: 'what a task may raise' (" in said
  assert "my_tasks.py:7); training goes on" in said
  assert len(lines(place / "noted", "eval.jsonl")) == 9


def test_or_ends_the_run_after_a_save(place, capsys):
  more = ["--config.eval.task_errors=stop"]
  args = ["train", "--config=config.py", "--workdir=ended", *options(RAISING)]
  assert main([*args, *more]) == 2
  error = capsys.readouterr().err
  assert "saved step 3, then stopped: task bad raised KeyError" in error
  # What it was due to evaluate on may change: it is no part of the training.
  assert main([*args, "--config.eval.sets=[]"]) == 0
  assert lines(place / "ended") == lines(place / "run")


@pytest.mark.parametrize(
  "sets, message",
  [
    ([{"name": "a b", "data": ["text"]}], "the name 'a b' is none of"),
    ([{"name": "router", "data": ["text"]}], "nor router or sources"),
    ([{"name": "x"}], "x needs data or a task"),
    ([{"name": "x", "data": ["text"], "task": "a.b"}], "one of them"),
    ([{"name": "x", "data": "text"}], "must be a tuple"),
    ([{"name": "x", "task": "print"}], "is not MODULE.FUNCTION"),
    ([{"name": "x", "task": "os.system(command='true')"}],
     "of Python's own library"),
    ([{"name": "x", "task": "my_tasks.nothing"}], "has no attribute"),
    ([{"name": "x", "task": "my_tasks.length(tims=2)"}], "'tims'"),
    ([{"name": "x", "task": "nowhere.f"}], "No module named 'nowhere'"),
    ([{"name": "x", "task": "my_tasks.length(times=open)"}],
     "must be a literal"),
    ([{"name": "x", "data": ["absent"]}], "no token store for absent"),
    ([{"name": "x", "data": ["text"], "evry": 3}],
     "did you mean 'eval.sets[0].every'"),
    ([{"name": "x", "data": ["text"], "every": -1}], "every=-1 is negative"),
    ([SETS[0], SETS[0]], "repeats one"),
    ("x", "must be a JSON list"),
  ],
)  # fmt: skip
def test_bad_sets_are_one_line(sets, message, capsys):
  text = sets if isinstance(sets, str) else json.dumps(sets)
  args = ["train", "--config=config.py", "--workdir=bad", *OPTIONS]
  assert main([*args, f"--config.eval.sets={text}"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_a_set_without_an_interval(capsys):
  args = ["train", "--config=config.py", "--workdir=bad", *options([SETS[1]])]
  assert main([*args, "--config.eval.every=0"]) == 2
  assert "length has no interval" in capsys.readouterr().err


def test_numbers_that_are_none(capsys):
  sets = [{"name": "w", "task": "my_tasks.wrong"}]
  assert train(config_of(sets), "wrong", report=False) == 0
  assert "task w raised ValueError" in capsys.readouterr().out
