# SPDX-License-Identifier: Apache-2.0
"""Names from data in pictures: no TeX, of any length, in any script."""

import json
import unicodedata

import pytest

from moejax.report import make_charts
from moejax.report.pictures import save_png
from moejax.report.rundata import load_run_data
from moejax.report.style import new_figure, plot_style, short_name
from tests.report.synthetic import Recipe, write_run

NAMES = [
  "a$\\frac{$",
  "$x^{ $y",
  "cost $5 or $6",
  "n" * 200,
  "中文" * 60,
  "عربي",
]


def texts_of(figure):
  return [
    x.get_text() for x in figure.findobj(lambda x: hasattr(x, "get_text"))
  ]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_phase(tmp_path, name):
  """Warnings of matplotlib are errors here."""
  folder = write_run(tmp_path / "a", Recipe())
  path = folder / "config.json"
  record = json.loads(path.read_text())
  record["config"]["train"]["phases"] = [
    {"name": "first", "steps": 10}, {"name": name}
  ]  # fmt: skip
  path.write_text(json.dumps(record))
  groups = make_charts(load_run_data(folder)).values()
  loss = next(c for group in groups for c in group if c.name == "loss")
  save_png(loss, tmp_path / "loss.png")
  with plot_style():
    figure = new_figure(*loss.size)
    loss.draw(figure, False)
    figure.draw_without_rendering()
  assert short_name(name, 24) in texts_of(figure)
  assert figure.axes[0].get_window_extent().width > 300


def width(text):
  return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


@pytest.mark.parametrize("most", [24, 32])
@pytest.mark.parametrize("name", NAMES)
def test_long_names_lose_their_middle(name, most):
  short = short_name(name, most)
  if width(name) <= most:
    assert short == name
    return
  first, last = short.split("…")
  assert name.startswith(first) and name.endswith(last) and first and last
  assert most - 2 < width(short) + 1 and width(short) <= most


def test_a_label_is_one_line():
  assert short_name("a\nb\tc ") == "a b c"
