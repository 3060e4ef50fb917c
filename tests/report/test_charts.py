# SPDX-License-Identifier: Apache-2.0
"""The pictures show the run's own numbers."""

import numpy as np
import pytest

from moejax.optimizer import schedule_values
from moejax.report import make_charts
from moejax.report.charts import number, percent
from moejax.report.curves import median_rate
from moejax.report.rundata import load_run_data
from moejax.report.style import new_figure, plot_style
from tests.report.synthetic import Recipe, load, loss


def charts_of(folder) -> dict:
  groups = make_charts(load_run_data(folder)).values()
  return {chart.name: chart for group in groups for chart in group}


def drawn(chart, narrow=False):
  """The axes of a chart."""
  with plot_style():
    figure = new_figure(*(chart.narrow_size if narrow else chart.size))
    chart.draw(figure, narrow)
    figure.draw_without_rendering()
  return figure.axes


def line(ax, label: str):
  (found,) = [c for c in ax.get_lines() if c.get_label() == label]
  return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_loss_curve_and_its_perplexity_axis(make_run):
  chart = charts_of(make_run("a"))["loss"]
  ax, right = drawn(chart)
  x, y = line(ax, "validation")
  assert x.tolist() == [20, 40]
  np.testing.assert_allclose(y, [loss(20) + 0.1, loss(40) + 0.1], rtol=1e-6)
  x, y = line(ax, "training")
  assert x[0] == 1 and x[-1] == 40
  assert y[0] == pytest.approx(loss(1)) and abs(y[-1] - loss(40)) < 0.02
  assert right.get_ylim() == ax.get_ylim()
  labels = [label.get_text() for label in right.get_yticklabels()]
  np.testing.assert_allclose(
    np.exp(right.get_yticks()), list(map(float, labels))
  )
  first, last = loss(20) + 0.1, loss(40) + 0.1
  assert chart.title == (
    f"Validation loss fell from {first:.2f} to {last:.3f} by step 40"
  )


def test_learning_rate_shows_the_whole_plan_and_the_part_done(make_run):
  chart = charts_of(make_run("a", done=15))["learning_rate"]
  (ax,) = drawn(chart)
  x, y = line(ax, "planned")
  np.testing.assert_array_equal(x, np.arange(1, 41))
  np.testing.assert_array_equal(y, schedule_values(Recipe(done=15).config()))
  x, _ = line(ax, "done")
  assert x.tolist() == list(range(1, 16))
  assert ax.get_xlim()[1] == 40
  assert chart.title == "Learning rate 0.003, decaying over the last 8 steps"


@pytest.mark.parametrize("narrow", [False, True])
def test_load_map_shows_load_over_fair_share(make_run, narrow):
  recipe = Recipe(layers=3, pattern=("attention/mlp", "attention/moe"))
  folder = make_run("a", layers=3, pattern=recipe.pattern)
  *panels, bar = drawn(charts_of(folder)["expert_load"], narrow)
  panels = [ax for ax in panels if ax.images]
  titles = [ax.get_title(loc="left") for ax in panels]
  assert titles == ["layer 1", "layer 3", "layer 5"], "their place in the stack"
  image = panels[0].images[0].get_array()
  ratio = np.log2(load(recipe, 40)[0] * 4)
  np.testing.assert_allclose(image[:, -1], ratio, atol=1e-5)
  # Records at 1, 5, 10, ... on an even axis: the first column is step 1.
  np.testing.assert_allclose(
    image[:, 0], np.log2(load(recipe, 1)[0] * 4), atol=1e-5
  )
  norm = panels[0].images[0].norm
  assert norm.vmin == -norm.vmax, "the fair share is the middle of the scale"
  assert "1" in [label.get_text() for label in bar.get_xticklabels()]
  assert bar.lines, "the fair share is marked on the colour bar"


def test_load_map_of_many_layers_shows_sixteen(make_run):
  folder = make_run("a", layers=40, experts=64, done=5)
  chart = charts_of(folder)["expert_load"]
  panels = [ax for ax in drawn(chart) if ax.images]
  titles = [ax.get_title(loc="left") for ax in panels]
  assert len(titles) == 16
  assert titles[0] == "layer 0" and titles[-1] == "layer 39"
  assert "16 of 40 layers" in chart.note


def test_final_load_and_spread(make_run):
  charts = charts_of(make_run("a"))
  final = load(Recipe(), 40) * 4
  (ax,) = drawn(charts["final_load"])
  dots = ax.get_lines()[0]
  np.testing.assert_allclose(dots.get_ydata(), final.ravel(), rtol=1e-6)
  assert f"{final.max():.2f}×" in charts["final_load"].title
  (ax,) = drawn(charts["load_spread"])
  x, y = line(ax, "median")
  assert x[-1] == 40 and y[-1] == pytest.approx(np.median(final), rel=1e-6)


def test_starving_experts_are_the_title(make_run, monkeypatch):
  import tests.report.synthetic as synthetic

  starving = np.array([[0.0, 0.01, 0.49, 0.5]] * 2, np.float32)
  monkeypatch.setattr(synthetic, "load", lambda recipe, step: starving)
  chart = charts_of(make_run("a"))["expert_load"]
  assert chart.title.startswith("4 of 8 experts get less than a tenth")
  drawn(chart)


def test_time_is_split_without_counting_twice(make_run):
  found = load_run_data(make_run("a")).goodput
  assert sum(found.parts.values()) == pytest.approx(found.total)
  assert found.parts["waiting for data"] == pytest.approx(40 * 0.05)
  assert found.parts["evaluation"] == pytest.approx(0.2)
  assert found.parts["compiling"] == pytest.approx(4.0)
  assert found.parts["training steps"] == pytest.approx(29.5 - 2.0 - 0.2)


def test_speed_leaves_out_the_step_that_compiles(make_run):
  run = load_run_data(make_run("a", done=2))
  assert run.timing["tokens_per_second"].tolist() == [51.2, 1024.0]
  assert median_rate(run, "tokens_per_second") == 1024.0


def test_gradient_clip_is_counted_and_drawn(make_run):
  chart = charts_of(make_run("a"))["gradient_norm"]
  # 3 / step > 1 in steps 1 and 2 of 40 (a norm of just 1 is not clipped).
  assert chart.title.endswith("clipped in 5\u00a0% of steps")
  (ax,) = drawn(chart)
  assert ax.get_yscale() == "log"
  assert 1.0 in [curve.get_ydata()[0] for curve in ax.get_lines()]


def test_metrics_of_unknown_name_get_a_chart_unless_constant(make_run):
  from moejax.metrics import RunLog

  folder = make_run("a", done=10)
  with RunLog(folder, 10) as log:
    for step in range(11, 20):
      log.step(step, {"loss/xent": 2.0, "my/metric": step**2, "flat": 1.0})
  charts = charts_of(folder)
  assert "my_metric" in charts and "flat" not in charts
  (ax,) = drawn(charts["my_metric"])
  assert line(ax, "my/metric")[0].tolist() == list(range(11, 20))


@pytest.mark.parametrize(
  "value, text",
  [(0.003, "0.003"), (4e-5, "4e-5"), (0.0004, "4e-4"), (1234.5, "1,234"),
   (0.0, "0"), (2.5, "2.5")],
)  # fmt: skip
def test_numbers_read_as_people_write_them(value, text):
  assert number(value) == text


@pytest.mark.parametrize(
  "share, text",
  [(0.384, "38 %"), (0.034, "3.4 %"), (0.0, "0 %"), (1.0, "100 %"),
   (0.0002, "< 0.1 %")],
)  # fmt: skip
def test_percentages(share, text):
  assert percent(share).replace("\u00a0", " ") == text
