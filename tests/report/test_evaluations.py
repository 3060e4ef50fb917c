# SPDX-License-Identifier: Apache-2.0
"""Everything that is evaluated in training is on the page."""

import json

from moejax.metrics import encode_line
from moejax.report import load_run_data, make_charts
from moejax.report.page import render
from moejax.report.style import new_figure, plot_style

NAN = float("nan")


def rewritten(folder, rows, sets=()):
  """The run with these evaluations, by step, and these sets in its config."""
  (folder / "eval.jsonl").write_bytes(
    b"".join(encode_line(step, row) for step, row in rows.items())
  )
  path = folder / "config.json"
  record = json.loads(path.read_text())
  record["config"]["eval"]["sets"] = [
    {"name": name, "data": [], "task": task, "every": 10, "num_batches": 0}
    for name, task in sets
  ]
  path.write_text(json.dumps(record))
  return load_run_data(folder)


def drawn(run, name):
  charts = [chart for found in make_charts(run).values() for chart in found]
  (chart,) = [chart for chart in charts if chart.name == name]
  with plot_style():
    figure = new_figure(*chart.size)
    chart.draw(figure, False)
    figure.draw_without_rendering()
  lines = figure.get_axes()[0].lines
  return chart, {line.get_label(): line for line in lines}


def validated(xent):
  return {
    "validation/xent": xent, "validation/perplexity": 9.0,
    "validation/bits_per_byte": 3.0, "validation/tokens": 99.0,
  }  # fmt: skip


def test_averages_and_tasks_are_drawn(make_run):
  rows = {
    step: validated(2.0) | {"validation_ema/xent": 1.5 + step / 100,
                            "validation/copying/accuracy": step / 40}
    for step in (20, 40)
  }  # fmt: skip
  folder = make_run("a", moe=False)
  run = rewritten(folder, rows, [("copying", "my_tasks.copying()")])
  _, lines = drawn(run, "loss")
  averaged = lines["validation of averaged weights"]
  assert averaged.get_ydata().tolist() == [1.7, 1.9]
  chart, lines = drawn(run, "tasks")
  assert chart.title == "Tasks: copying/accuracy 1"
  assert lines["copying/accuracy"].get_ydata().tolist() == [0.5, 1.0]


def test_steps_that_validated_nothing_are_no_rows_of_nan(make_run):
  rows = {10: {"validation/books/xent": 2.0}, 20: validated(2.5),
          30: {"validation/books/xent": 1.9}, 40: validated(NAN)}  # fmt: skip
  run = rewritten(make_run("a", moe=False), rows)
  text = render(run, make_charts(run))
  table = text.partition("<summary>Evaluations")[2].partition("</table>")[0]
  assert "2, newest first" in table
  assert "2.5000" in table and "not finite" in table and ">nan<" not in table


def test_a_validation_loss_that_is_never_finite_squeezes_no_picture(make_run):
  """Warnings are errors here, as of a layout that collapses."""
  run = rewritten(make_run("a", moe=False), {20: validated(NAN)})
  _, lines = drawn(run, "loss")
  assert "validation" not in lines
  assert render(run, make_charts(run))
