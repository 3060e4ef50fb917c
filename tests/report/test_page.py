# SPDX-License-Identifier: Apache-2.0
"""The page: whole, alone, safe, and made of whatever a run has."""

import dataclasses
import html.parser
import json
import re
import struct

import numpy as np
import pytest

from moejax.errors import DataError, UserError
from moejax.report import load_run_data, main, make_charts, write_report
from moejax.report.curves import metric_chart
from moejax.report.page import card, escape, render
from moejax.report.rundata import Table
from moejax.report.style import DARK, LIGHT
from tests.report.synthetic import loss

VOID = {"meta", "br", "image", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
  """Collects what a browser would act on."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.ids, self.links, self.stack = [], [], [], []
    self.text: dict[str, list[str]] = {}
    self.feed(text)
    assert self.stack == [], f"not closed: {self.stack}"

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    for name, value in attributes:
      if name == "id":
        self.ids.append(value)
      if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
        self.links.append(value)
      assert not name.startswith("on"), f"script in {name}"
    if tag not in VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self.stack.pop()

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.stack.pop() == tag

  def handle_data(self, data):
    for tag in set(self.stack):
      self.text.setdefault(tag, []).append(data)


def rendered(folder) -> str:
  """The page without its pictures, which are what takes long."""
  return render(load_run_data(folder), {"Routing": []})


def chart_names(folder) -> set[str]:
  charts = make_charts(load_run_data(folder)).values()
  return {chart.name for group in charts for chart in group}


def render_all(folder) -> str:
  run = load_run_data(folder)
  return render(run, make_charts(run))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The folder of one full report."""
  from tests.report.synthetic import Recipe, write_run

  folder = write_run(tmp_path_factory.mktemp("runs") / "my run", Recipe())
  assert write_report(folder) == folder / "report" / "index.html"
  return folder / "report"


def test_page_stands_alone(report):
  text = (report / "index.html").read_text()
  page = Page(text)
  assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
  assert page.links, "pictures use links within the page"
  for link in page.links:
    assert link.startswith(("#", "data:image/png;base64,")), link
  css = "".join(page.text["style"])
  assert "@import" not in css and "url(" not in css
  namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert set(re.findall(r"https?://[^\"'\s<>]+", text)) <= namespaces


def test_ids_are_unique_and_links_within_the_page_resolve(report):
  text = (report / "index.html").read_text()
  page = Page(text)
  assert len(page.ids) == len(set(page.ids))
  used = set(re.findall(r"url\(#([^)]+)\)", text))
  used |= {link[1:] for link in page.links if link.startswith("#")}
  assert used and used <= set(page.ids)


def test_colours_follow_the_scheme(report):
  text = (report / "index.html").read_text()
  svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
  for role, colour in LIGHT.items():
    assert colour not in svgs, f"{role} is fixed in a picture"
    assert f"--{role}: {colour};" in text
    assert f"--{role}: {DARK[role]};" in text
  assert "prefers-color-scheme: dark" in text
  # Text is text: it takes the page's font and can be found and read aloud.
  assert "var(--font)" in svgs and "DejaVu" not in svgs
  assert len(set(LIGHT.values())) == len(LIGHT)


def luminance(colour: str) -> float:
  channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  linear = np.where(
    channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
  )
  return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_and_curves_have_contrast(palette):
  def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)

  card = palette["card"]
  assert min(contrast(palette[c], card) for c in ("ink", "soft")) >= 4.5
  curves = ("blue", "orange", "green", "purple")
  assert min(contrast(palette[c], card) for c in curves) >= 3.0


def test_headline_numbers(report):
  text = (report / "index.html").read_text()
  tiles = dict(
    re.findall(
      r'class="label">([^<]*)</div><div class="value">([^<]*)</div>', text
    )
  )
  assert tiles["validation loss"] == f"{loss(40) + 0.1:.3f}"
  assert tiles["bits per byte"] == "1.525"
  assert tiles["parameters"] == "12.3M" and "4.56M active" in text
  assert tiles["tokens seen"] == "20.5k"
  # Without the first step, which compiles.
  assert tiles["tokens per second"] == "1.02k"
  assert tiles["model FLOP/s"] == "27.6G"
  assert tiles["time"] == "30 s"
  assert abs(float(tiles["training loss"]) - loss(40)) < 0.02
  assert ">finished<" in text and "commit 0123456789" in text
  assert "<title>my run: finished</title>" in text


def test_pictures_lie_beside_the_page(report):
  text = (report / "index.html").read_text()
  cards = re.findall(r'<section class="card [^"]*" id="([^"]+)"', text)
  assert {"loss", "learning_rate", "expert_load", "time"} <= set(cards)
  names = {path.name for path in report.iterdir()}
  assert names == {f"{c}.png" for c in cards} | {"index.html", "overview.png"}
  for path in report.glob("*.png"):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 400


def test_config_lists_all_options_and_marks_changes(report):
  text = (report / "index.html").read_text()
  assert "<code>optimizer.schedule.warmup</code>" in text
  changed = re.findall(r"<tr class=changed><td><code>([^<]+)", text)
  assert "model.num_layers" in changed and "seed" not in changed
  assert "peak learning rate" in text and "top_k(k=2)" in text


def test_samples_can_do_no_harm(make_run):
  evil = (
    '<script>alert(1)</script>\x1b[31m\x00\u202eabc</pre>\ud800 & "q" 中文\n'
  )
  folder = make_run("a", samples=(evil, "earlier"))
  text = rendered(folder)
  page = Page(text)
  text.encode("utf-8")
  assert "script" not in page.tags
  assert "<script>alert(1)</script>⟨1b⟩[31m⟨00⟩⟨202e⟩abc</pre>" in "".join(
    page.text["pre"]
  )
  assert "中文" in text and "def f():" in text
  assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)


def test_names_are_escaped(make_run):
  folder = make_run("<b>&x")
  page = Page(rendered(folder))
  assert "<b>&x" in "".join(page.text["h1"]) and "b" not in page.tags
  assert escape("'\"") == "&#x27;&quot;"


def test_names_of_metrics_are_no_tags():
  """A run's folder from elsewhere is opened by whoever looks at its report."""
  key = 'x"><img src=y onerror=alert(1)>\x00/../..'
  values = {key: np.arange(4.0)}
  run = dataclasses.make_dataclass("Run", ["metrics", "last_step"])(
    Table(np.arange(1, 5), values), 4
  )
  chart = metric_chart(run, key)
  assert re.fullmatch(r"[\w.-]+", chart.name)
  assert "img" not in Page(card(chart)).tags


def test_run_that_goes_on(make_run):
  folder = make_run("a", done=12)
  with open(folder / "metrics.jsonl", "a") as f:
    f.write('{"step": 13, "loss/xe')
  text = rendered(folder)
  assert "not finished" in text and "step 12 of 40" in text


def test_run_without_evaluations_samples_and_timing(make_run):
  folder = make_run("a", evaluations=False, timing=False)
  text = rendered(folder)
  assert "What the model writes" not in text and "Evaluations" not in text
  assert "validation loss" not in text
  assert "loss" in chart_names(folder)
  assert not {"throughput", "time"} & chart_names(folder)


def test_dense_model(make_run):
  folder = make_run("a", moe=False)
  text = rendered(folder)
  assert "Routing" not in text and "experts" not in text.split("Details")[0]
  assert chart_names(folder) == {
    "loss", "learning_rate", "gradient_norm", "loss_recent", "throughput",
    "time", "loss_total", "loss_z",
  }  # fmt: skip


def test_run_of_one_step(make_run):
  text = render_all(make_run("a", steps=20, done=1))
  assert "at the first step" in text and 'id="expert_load"' in text


def test_loss_that_is_not_a_number(make_run):
  bad = {step: float("nan") for step in range(30, 41)} | {12: float("inf")}
  text = render_all(make_run("a", loss_at=bad, moe=False))
  assert "The loss is not finite from step 12 on" in text
  assert ">diverged<" in text


def test_loss_that_never_was_a_number(make_run):
  bad = {step: float("nan") for step in range(1, 41)}
  folder = make_run(
    "a", loss_at=bad, evaluations=False, moe=False, timing=False
  )
  text = render_all(folder)
  assert "not finite from step 1 on" in text


def test_config_of_another_version(make_run):
  folder = make_run("a")
  record = json.loads((folder / "config.json").read_text())
  record["config"]["model"]["flux"] = 1.21
  (folder / "config.json").write_text(json.dumps(record))
  text = rendered(folder)
  assert "model.flux" in text
  assert {"learning_rate", "expert_load"} <= chart_names(folder)


def test_missing_and_damaged_folders_are_one_line(make_run, tmp_path):
  with pytest.raises(
    DataError, match=r"not the folder of a run: .*config\.json"
  ):
    write_report(tmp_path / "nowhere")
  folder = make_run("a")
  (folder / "metrics.jsonl").unlink()
  with pytest.raises(DataError, match="no finished step"):
    write_report(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(DataError, match="cannot be read"):
    write_report(folder)
  (folder / "config.json").write_text("{}")
  with pytest.raises(DataError, match="not what a run writes"):
    write_report(folder)


def test_output_that_cannot_be_written(make_run, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write the report"):
    write_report(make_run("a", done=1), tmp_path / "file")


def test_command_writes_where_it_is_told(make_run, tmp_path, capsys):
  folder = make_run("a", done=2, moe=False, timing=False)
  assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
  path = tmp_path / "out" / "index.html"
  assert capsys.readouterr().out == f"{path}\n" and path.exists()
  assert not (folder / "report").exists()
  with pytest.raises(UserError, match="one run"):
    main([str(folder), str(folder), "--output", "x"])
