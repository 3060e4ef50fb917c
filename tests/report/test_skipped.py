# SPDX-License-Identifier: Apache-2.0
"""Steps that were not taken are no divergence, and are told of."""

import json

from moejax.report import load_run_data, make_charts
from moejax.report.page import render
from moejax.stability import NOT_FINITE, REASONS, SPIKE
from tests.report.test_page import Page

NAN = float("nan")


def page_of(folder) -> str:
  run = load_run_data(folder)
  return render(run, make_charts(run))


def test_a_skipped_step_is_no_divergence(make_run):
  folder = make_run("a", moe=False, loss_at={12: NAN}, skipped={12: NOT_FINITE})
  text = page_of(folder)
  assert ">finished<" in text and "diverged<" not in text
  assert "not finite from step" not in text
  assert "1 step skipped (1 not finite)" in text
  assert "Validation loss fell" in text


def test_what_was_skipped_is_in_a_table(make_run):
  reasons = dict.fromkeys(range(3, 24), NOT_FINITE) | {30: SPIKE}
  bad = dict.fromkeys(range(3, 24), NAN) | {30: 50.0}
  folder = make_run("a", moe=False, loss_at=bad, skipped=reasons)
  text = page_of(folder)
  assert "22 steps skipped (21 not finite, 1 spike)" in text
  assert "the first 20 of 22" in text
  page = Page(text)
  assert "b" not in page.tags
  table = text.partition("<summary>Skipped steps")[2].partition("</table>")[0]
  rows = table.split("<tr>")[2:]
  assert len(rows) == 20 and REASONS[NOT_FINITE] in rows[0]
  assert '<td class="number">3</td>' in rows[0]
  assert "&lt;b&gt;texts row 0, &lt;b&gt;texts row 7" in rows[0]
  assert "row 49 and 4 more" in rows[0] and "row 56" not in rows[0]


def test_not_finite_and_taken_is_a_divergence(make_run):
  bad = {12: NAN, 20: NAN}
  taken = make_run("taken", moe=False, loss_at=bad, skipped={12: NOT_FINITE})
  text = page_of(taken)
  assert ">diverged<" in text and "not finite from step 20 on" in text
  norms = make_run("norms", moe=False, skipped={})
  path = norms / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[14]["param_norm"] = "NaN"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  text = page_of(norms)
  assert ">diverged<" in text
  assert "the parameters are not finite from step 15 on" in text


def test_no_step_was_ever_taken(make_run):
  steps = range(1, 6)
  folder = make_run(
    "a", moe=False, done=5, evaluations=False,
    loss_at=dict.fromkeys(steps, NAN),
    skipped=dict.fromkeys(steps, NOT_FINITE),
  )  # fmt: skip
  text = page_of(folder)
  assert "No step has a finite loss" in text
  assert "5 steps skipped (5 not finite)" in text


def test_odd_rows_of_the_log_break_nothing(make_run):
  folder = make_run("a", moe=False, skipped={3: SPIKE})
  with open(folder / "skipped.jsonl", "a") as f:
    f.write('{"step": 4}\n{"step": 5, "reason": 9, "rows": 1}\n')
    f.write('{"step": 6, "reason": "x", "rows": [["Infinity", 2]]}\n')
  assert "Skipped steps" in page_of(folder)


def test_numbers_that_stand_for_something_are_not_drawn(make_run):
  folder = make_run("a", skipped={12: SPIKE}, phased=True)
  charts = make_charts(load_run_data(folder)).values()
  names = {chart.name for group in charts for chart in group}
  assert not {"phase", "batch_digest", "skipped"} & names
  assert "param_norm" in names  # another metric is
