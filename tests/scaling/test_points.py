# SPDX-License-Identifier: Apache-2.0
"""Reading runs and tables."""

import json

import numpy as np
import pytest

from moejax.errors import DataError
from moejax.models import train_flops_per_token
from moejax.scaling import ComputeLaw, LossLaw, read_points
from moejax.scaling.points import compute_law, to_csv
from tests.report.synthetic import Recipe, loss, write_run
from tests.scaling.synthetic import points_of

LAW = LossLaw(1.7, 300.0, 500.0, 0.31, 0.28)


def edit_config(folder, section, key, value):
  path = folder / "config.json"
  record = json.loads(path.read_text())
  record["config"][section][key] = value
  path.write_text(json.dumps(record))


def test_a_run_is_a_point(tmp_path):
  write_run(tmp_path / "a", Recipe())
  points = read_points([str(tmp_path / "a")])
  tokens = 40 * 32 * 1024  # steps, rows, tokens a row
  assert points.names == ("a",)
  assert points.params.tolist() == [4_560_000]
  assert points.tokens.tolist() == [tokens]
  assert points.flops.tolist() == [2.7e7 * tokens]
  assert points.loss == pytest.approx([loss(40) + 0.1], rel=1e-6)
  assert points.notes == ()


def test_a_run_of_phases_is_added_up(tmp_path):
  """Ten steps of four rows of 512, then thirty of 32 rows of 1024."""
  write_run(tmp_path / "a", Recipe())
  short = {"data.seq_len": 512, "train.batch_size": 4}
  edit_config(tmp_path / "a", "train", "phases", [
    {"name": "short", "steps": 10, "options": short}, {"name": "whole"},
  ])  # fmt: skip
  points = read_points([str(tmp_path / "a")])
  first, rest = 10 * 4 * 512, 30 * 32 * 1024
  assert points.tokens.tolist() == [first + rest]
  model = Recipe().config().model
  flops = first * train_flops_per_token(model, 512)
  flops += rest * train_flops_per_token(model, 1024)
  np.testing.assert_allclose(points.flops, [flops], rtol=1e-12)


def test_a_run_without_its_embedding_tables(tmp_path):
  """Two tables of 384 x 16."""
  write_run(tmp_path / "a", Recipe())
  edit_config(tmp_path / "a", "model", "d_model", 16)
  points = read_points([str(tmp_path / "a")], "non-embedding")
  assert points.params.tolist() == [4_560_000 - 2 * 384 * 16]


@pytest.mark.parametrize(
  "recipe, message",
  [
    (Recipe(done=20), "at step 20 of 40; finish it with moejax train"),
    (Recipe(evaluations=False), "no validation loss; train with eval.every"),
    (
      Recipe(steps=50, done=50),
      "not validated at its last step 50, only at 40",
    ),
  ],
)
def test_a_run_that_is_no_point(tmp_path, recipe, message):
  write_run(tmp_path / "a", recipe)
  with pytest.raises(DataError, match=message):
    read_points([str(tmp_path / "a")])


def test_runs_on_other_data_are_not_compared(tmp_path):
  for name in "ab":
    write_run(tmp_path / name, Recipe())
  edit_config(tmp_path / "b", "data", "tokenizer", "other.json")
  with pytest.raises(DataError, match="a and b differ in data.tokenizer"):
    read_points([str(tmp_path / name) for name in "ab"])


@pytest.mark.parametrize("more", [1, 2, 16])
def test_runs_validated_on_other_tokens_are_not_compared(tmp_path, more):
  write_run(tmp_path / "a", Recipe(validated=16384))
  write_run(tmp_path / "b", Recipe(validated=16384 * (1 + more / 16)))
  message = f"a and b were validated on 16,384 and {16384 + 1024 * more:,} tok"
  with pytest.raises(DataError, match=message):
    read_points([str(tmp_path / name) for name in "ba"])


def test_batches_of_validation_may_differ_where_its_tokens_do_not(tmp_path):
  for name, luck in (("a", 0.0), ("b", 0.01)):
    write_run(tmp_path / name, Recipe(luck=luck))
  for key, value in (
    ("num_batches", 32), ("batch_size", 4), ("every", 7), ("sample_tokens", 9),
  ):  # fmt: skip
    edit_config(tmp_path / "b", "eval", key, value)
  assert read_points([str(tmp_path / name) for name in "ab"]).notes == ()


def test_runs_of_a_sweep_have_names_of_their_own(tmp_path):
  folders = [tmp_path / "one" / f"p{i}" / "seed_0" for i in range(2)]
  folders.append(tmp_path / "other" / "seed_1")
  for i, folder in enumerate(folders):
    write_run(folder, Recipe(luck=0.01 * i))
  points = read_points([str(folder) for folder in folders])
  assert points.names == ("one/p0/seed_0", "one/p1/seed_0", "other/seed_1")
  assert read_points([str(f) for f in folders[1:]]).names == (
    "seed_0", "seed_1",
  )  # fmt: skip


def test_what_else_differs_is_noted_and_sizes_are_not(tmp_path):
  write_run(tmp_path / "a", Recipe())
  write_run(tmp_path / "b", Recipe(layers=4, experts=8, steps=60, done=60))
  edit_config(tmp_path / "b", "checkpoint", "every", 7)
  points = read_points([str(tmp_path / name) for name in "ab"])
  (note,) = points.notes
  assert note.endswith("size and length: model.moe.num_experts")


def test_a_table_comes_back_as_it_was_written(tmp_path):
  points = points_of(LAW, noise=1e-3)
  (tmp_path / "p.csv").write_text(to_csv(points))
  again = read_points([str(tmp_path / "p.csv")])
  assert again.names == points.names
  for name in ("params", "tokens", "flops", "loss"):
    np.testing.assert_array_equal(getattr(again, name), getattr(points, name))


def test_a_path_is_given_once(tmp_path, monkeypatch):
  write_run(tmp_path / "a", Recipe())
  (tmp_path / "p.csv").write_text(to_csv(points_of(LAW)))
  (tmp_path / "link").symlink_to("a")
  monkeypatch.chdir(tmp_path)
  for first, second in (
    ("p.csv", "p.csv"), ("p.csv", "./p.csv"), ("a", str(tmp_path / "a")),
    ("a", "link"),
  ):  # fmt: skip
    message = f"{first} and {second} are one path; points count once"
    with pytest.raises(DataError, match=message):
      read_points([first, second])


def test_a_run_is_one_point_also_of_a_table(tmp_path, monkeypatch):
  """The points.csv of an earlier fit beside the runs that it is of."""
  monkeypatch.chdir(tmp_path)
  for name, luck in (("a", 0.0), ("b", 0.01)):
    write_run(tmp_path / name, Recipe(luck=luck))
  (tmp_path / "p.csv").write_text(to_csv(read_points(["a", "b"])))
  with pytest.raises(DataError, match="^a and a of p.csv are one point: size"):
    read_points(["a", "p.csv"])
  (tmp_path / "q.csv").write_text((tmp_path / "p.csv").read_text())
  with pytest.raises(DataError, match="^a of p.csv and a of q.csv are one po"):
    read_points(["p.csv", "q.csv"])
  write_run(tmp_path / "c", Recipe(luck=1e-6))  # another seed is another point
  assert len(read_points(["a", "b", "c"])) == 3


def test_a_tables_column_says_what_n_counts(tmp_path):
  points = points_of(LAW)
  (tmp_path / "p.csv").write_text(to_csv(points, "non-embedding"))
  again = read_points([str(tmp_path / "p.csv")], "non-embedding")
  np.testing.assert_array_equal(again.params, points.params)
  with pytest.raises(DataError, match="no column active_params"):
    read_points([str(tmp_path / "p.csv")])


def test_a_json_table_without_flops_counts_6nd(tmp_path):
  rows = [{"active_params": 1e6, "tokens": 2e7, "loss": 3.2}]
  (tmp_path / "p.json").write_text(json.dumps(rows))
  points = read_points([str(tmp_path / "p.json")])
  assert points.flops.tolist() == [6 * 1e6 * 2e7]
  assert points.names == ("p-1",)
  assert "1 points without flops count as 6 N D" in points.notes[0]


def test_tables_and_runs_together(tmp_path):
  write_run(tmp_path / "a", Recipe())
  (tmp_path / "p.csv").write_text("active_params,tokens,loss\n1e6,2e7,3.2\n")
  points = read_points([str(tmp_path / "p.csv"), str(tmp_path / "a")])
  assert sorted(points.names) == ["a", "p-1"]


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("p.csv", "active_params,tokens\n1,2\n", "no column loss"),
    ("p.csv", "active_params,tokens,loss\n", "has no points"),
    ("p.csv", "active_params,tokens,loss\n1e6,2e7,x\n", "point 1: loss='x'"),
    ("p.csv", "active_params,tokens,loss\n1e6,2e7\n", "loss=None is no number"),
    ("p.csv", "active_params,tokens,loss\n1e6,0,2\n", "tokens=0 must be pos"),
    ("p.csv", "active_params,tokens,loss\n1e6,1,nan\n", "loss=nan must be pos"),
    ("p.json", "[{]", "is no JSON"),
    ("p.json", '{"a": 1}', "is no list of points such as"),
  ],
)
def test_a_bad_table_is_named(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=message) as caught:
    read_points([str(tmp_path / name)])
  assert str(tmp_path / name) in str(caught.value)


def test_no_table(tmp_path):
  with pytest.raises(DataError, match="no table"):
    read_points([str(tmp_path / "none.csv")])


def test_the_compute_law_of_points():
  truth = ComputeLaw(30.0, 0.92)
  found, error = compute_law(points_of(LAW, compute=truth))
  assert found.coefficient == pytest.approx(30, rel=1e-9)
  assert found.exponent == pytest.approx(0.92, rel=1e-9)
  assert error < 1e-9
