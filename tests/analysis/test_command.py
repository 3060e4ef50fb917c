# SPDX-License-Identifier: Apache-2.0
"""`moejax analyze`, from a run trained on real text to its page and tables."""

import gzip
import json
import re
import struct

import numpy as np
import pytest

from moejax import analysis
from moejax.__main__ import main
from moejax.analysis import page, results, text
from moejax.cli import whole_number
from moejax.errors import ConfigError
from moejax.report.style import new_figure, plot_style
from tests.analysis.small_model import E, make_run, make_texts
from tests.report.test_page import Page
from tests.small_run import CONFIG, moejax

PICTURES = {
  "saturation", "co_activation", "domains", "vocabulary", "load",
  "load_over_time", "entropy", "similarity", "similarity_map",
}  # fmt: skip
TABLES = {
  "saturation", "co_activation", "domains", "vocabulary", "load", "entropy",
  "similarity", "tokens",
}  # fmt: skip
OVERRIDES = (
  "--config.train.num_steps=16", "--config.checkpoint.every=8",
  "--config.eval.every=0",
)  # fmt: skip


def excerpt(path):
  """The first 40,000 characters of a compressed text."""
  with gzip.open(path, "rt", encoding="utf-8") as f:
    return f.read(40_000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_data):
  """The folder of a run of 16 steps on real text, and its analysis."""
  place = tmp_path_factory.mktemp("trained")
  (place / "config.py").write_text(CONFIG)
  (place / "text").mkdir()
  for name in ("arxiv", "wikipedia"):
    words = excerpt(shared_data / "domains" / f"{name}_texts.txt.gz")
    (place / "text" / f"{name}.txt").write_text(words)
  for args in (
    ["data", "prepare", "--config=config.py"],
    ["train", "--config=config.py", "--workdir=run", *OVERRIDES],
  ):
    done = moejax(place, *args)
    assert done.returncode == 0, done.stderr
  done = moejax(
    place, "analyze", "run:all", "--data=papers=text/arxiv.txt",
    "--data=text/wikipedia.txt", "--tokens=8e3", "--min-count=5",
    "--sample=32",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout == "run/analysis/index.html\n"
  assert "step 16, tokens" in done.stderr
  return place


def test_all_files_are_there(trained):
  folder = trained / "run" / "analysis"
  names = {path.name for path in folder.iterdir()}
  assert names == {
    "index.html", "summary.json", *(f"{x}.png" for x in PICTURES),
    *(f"{x}.parquet" for x in TABLES),
  }  # fmt: skip
  for name in PICTURES:
    data = (folder / f"{name}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 600 and height > 400


def test_the_page_says_how_to_read_each_picture_and_what_chance_is(trained):
  source = (trained / "run" / "analysis" / "index.html").read_text()
  found = Page(source)
  assert len(found.ids) == len(set(found.ids))
  assert all(link.startswith(("#", "data:image/png")) for link in found.links)
  assert "script" not in found.tags
  cards = re.findall(
    r'<section class="card [^"]*" id="(\w+)"><h3>(.*?)</h3>'
    r'<p class="note">(.*?)</p>', source
  )  # fmt: skip
  assert {name for name, _, _ in cards} == PICTURES
  for _, title, note in cards:
    assert re.search(r"\d", title)  # a finding with its number
    assert re.search(
      "dashed|Dashed|middle of the scale|light everywhere", note
    ), note
  shown = " ".join(found.text["main"])
  for words in (
    "step 16, compared with 8", "2 routers, 4 experts, 2 a token", "papers",
    "wikipedia", "expert\xa03", "by the predicted next token",
  ):  # fmt: skip
    assert words in shown
  assert "Left out" not in shown


def test_summary_and_tables_hold_the_same_numbers(trained):
  parquet = pytest.importorskip("pyarrow.parquet")
  folder = trained / "run" / "analysis"
  summary = json.loads((folder / "summary.json").read_text())
  tables = {
    name: parquet.read_table(folder / f"{name}.parquet").to_pydict()
    for name in TABLES
  }
  assert summary["routers"] == ["layer 0", "layer 1"]
  assert summary["saturation"]["steps"] == [8, 16]
  assert tables["saturation"]["share"][2:] == [1.0, 1.0]
  np.testing.assert_allclose(
    summary["saturation"]["share"][0], tables["saturation"]["share"][:2],
    rtol=1e-5,
  )  # fmt: skip
  assert summary["domains"]["domains"] == ["papers", "wikipedia"]
  assert 7000 < sum(summary["domains"]["tokens"]) <= 8000
  largest = np.reshape(tables["domains"]["share"], (2, 2, 4)).max(-1)
  np.testing.assert_allclose(
    summary["domains"]["largest_share"], largest, rtol=1e-5
  )
  load = np.reshape(tables["load"]["load"], (2, 2, 4))
  np.testing.assert_allclose(load.mean(-1), 1.0, rtol=1e-9)
  assert set(tables["tokens"]["kind"]) == {"input", "predicted", "next"}
  assert "␣" in tables["tokens"]["text"]


def test_one_checkpoint_leaves_saturation_out_and_says_so(
  tmp_path, capsys, monkeypatch
):
  make_texts(tmp_path)
  make_run(tmp_path / "run")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  args = ["analyze", "run", "--data=code", "--data=prose", "--output=out"]
  assert main([*args, "--min-count=9999"]) == 0
  printed = capsys.readouterr().out
  assert "note: saturation needs several checkpoints of a run" in printed
  assert "note: vocabulary: no token id occurs 9999 times" in printed
  assert "note: tables are CSV files; Parquet: pip install" in printed
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert not {"saturation.png", "vocabulary.png", "load_over_time.png"} & names
  lines = (tmp_path / "out" / "load.csv").read_text().splitlines()
  assert lines[0] == "checkpoint,router,expert,step,load"
  assert len(lines) == 1 + 4 * E
  assert "Left out" in (tmp_path / "out" / "index.html").read_text()


def test_a_page_over_another_leaves_nothing_of_that_one(
  tmp_path, capsys, monkeypatch
):
  """Measures that are gone, CSV beside Parquet; files of others stay."""
  pytest.importorskip("pyarrow")
  make_texts(tmp_path)
  make_run(tmp_path / "run")
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "run" / "analysis"
  folder.mkdir()
  (folder / "tokens.csv").write_text("of somebody else")
  args = ["analyze", "run", "--data=code", "--data=prose"]
  # On text too short for all tokens of the sample, which is said.
  assert main([*args, "--tokens=128", "--min-count=2"]) == 0
  words = "similarity: only 128 of --sample=256 tokens, for want of text"
  assert f"note: {words}" in capsys.readouterr().out
  assert words in (folder / "index.html").read_text()
  assert (folder / "tokens.csv").is_file()  # there was no page before
  first = {path.name for path in folder.iterdir()}
  assert {"vocabulary.png", "vocabulary.parquet", "tokens.parquet"} <= first
  (folder / "notes.csv").write_text("of somebody else")
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  assert main([*args, "--min-count=9999"]) == 0
  names = {path.name for path in folder.iterdir()}
  measures = {"co_activation", "domains", "load", "entropy", "similarity"}
  assert names == {
    "index.html", "summary.json", "notes.csv", "similarity_map.png",
    *(f"{name}{suffix}" for name in measures for suffix in (".csv", ".png")),
  }  # fmt: skip


def test_a_page_of_other_domains_is_replaced_with_a_note(
  tmp_path, capsys, monkeypatch
):
  """And is called by its sweep's point too, if its folder is a seed's."""
  make_texts(tmp_path)
  make_run(tmp_path / "warm" / "seed_0")
  monkeypatch.chdir(tmp_path)
  analyze = lambda *data: main([
    "analyze", "warm/seed_0", "--tokens=256", "--output=out", *data
  ])  # fmt: skip
  note = "note: the page in out is of "
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "summary.json").write_text("[1]")  # of somebody else
  assert analyze("--data=code", "--data=prose") == 0
  assert note not in capsys.readouterr().out
  assert analyze("--data=prose", "--data=code") == 0
  assert note not in capsys.readouterr().out
  assert analyze("--data=prose/5.txt") == 0
  told = capsys.readouterr().out
  assert f"{note}prose, code; this one of 5 takes its place" in told
  source = (tmp_path / "out" / "index.html").read_text()
  assert "<h1>Routing of warm/seed_0</h1>" in source
  assert "one domain tells no specialisation from load" in source


def test_known_names_are_those_of_all_pictures():
  assert set(page.PICTURES) == PICTURES
  assert {*page.HEADINGS, "tokens"} == TABLES


def test_a_table_is_whole_or_not_written(tmp_path, monkeypatch):
  """A name with half a character cannot be encoded."""
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  table = {"n": np.arange(3), "text": np.array(["a", "b,c", "é"])}
  path = results.write_table(tmp_path, "tokens", table)
  kept = path.read_bytes()
  assert kept.decode() == 'n,text\r\n0,a\r\n1,"b,c"\r\n2,é\r\n'
  table["text"] = np.array(["a", "b", "\ud800"])
  with pytest.raises(UnicodeEncodeError):
    results.write_table(tmp_path, "tokens", table)
  assert path.read_bytes() == kept
  assert [path.name for path in tmp_path.iterdir()] == ["tokens.csv"]


@pytest.mark.parametrize(
  "model",
  [
    {"pattern": ("attention/moe",), "prefix": ()},
    {"moe": {"num_experts": E, "d_expert": 12, "router": "top_k(k=1)"},
     "pattern": ("attention/moe",), "scan_layers": False},
    {"moe": {"num_experts": 8, "d_expert": 12, "router":
             "expert_choice(k=2, group_size=32)"},
     "pattern": ("attention/moe",)},
    {"moe": {"num_experts": E, "d_expert": 12, "router":
             "null_experts(k=2, num_null=4)"},
     "pattern": ("attention/moe",)},
  ],
  ids=["top-2", "top-1", "expert choice", "null experts"],
)  # fmt: skip
def test_other_models_have_a_page_too(tmp_path, model, monkeypatch, capsys):
  make_texts(tmp_path)
  make_run(tmp_path / "run", **model)
  monkeypatch.chdir(tmp_path)
  assert main(["analyze", "run", "--data=code", "--data=prose"]) == 0
  left_out = "co-activation: each token has one expert" in (
    capsys.readouterr().out
  )
  is_top_1 = "moe" in model and "k=1" in model["moe"]["router"]
  assert left_out == is_top_1
  Page((tmp_path / "run" / "analysis" / "index.html").read_text())


@pytest.mark.parametrize(
  "args, message",
  [
    ([], "there is no text to watch the routers on; add --data=NAME=FILE"),
    (["--data=x="], "--data=x= is not NAME=FILE"),
    (["--data=code", "--data=x=prose", "--data=x=short.txt"],
     "--data=x=short.txt: domain x is prose already; give it another NAME=, or "
     "both as one folder or glob"),
    (["--data=short.txt", "--data=code/short.jsonl"],
     "--data=code/short.jsonl: domain short is short.txt already"),
    (["--data=x=gone.txt"], "data source 'gone.txt' is not there"),
    (["--data=short.txt"],
     "domain short has 7 tokens, less than one window of data.seq_len=32"),
    (["--data=code", "--tokens=0"], "--tokens=0 is not in [1, 2147483647]"),
    (["--data=code", "--data=prose", "--tokens=63"],
     "--tokens=63 is less than a window of data.seq_len=32 for each domain; "
     "give at least 64"),
    (["--data=code", "--batch-size=-1"], "--batch-size=-1 is negative"),
    (["--data=code", "--min-count=0"], "--min-count=0 must be positive"),
    (["--data=code", "--sample=0"], "--sample=0 must be positive"),
    (["--data=code", "--output=short.txt"], "cannot write to short.txt"),
  ],
)  # fmt: skip
def test_refusals_are_one_line(tmp_path, args, message, monkeypatch, capsys):
  make_texts(tmp_path)
  make_run(tmp_path / "run")
  (tmp_path / "short.txt").write_text("abcde")
  monkeypatch.chdir(tmp_path)
  assert main(["analyze", "run", *args]) == 2
  printed = capsys.readouterr().err
  assert printed.count("\n") == 1 and message in printed


@pytest.mark.parametrize(
  "given, wanted",
  [("10000", 10_000), ("1e4", 10_000), ("2.5e3", 2_500), ("-3", -3),
   (f"{2**60 + 1}", 2**60 + 1)],
)  # fmt: skip
def test_whole_numbers_of_the_command_line(given, wanted):
  assert whole_number(given) == wanted


@pytest.mark.parametrize("given", ["1.5", "1e-2", "inf", "nan", "many", ""])
@pytest.mark.parametrize("option", ["--tokens", "--min-count", "--sample"])
def test_what_is_no_whole_number(given, option, capsys):
  with pytest.raises(SystemExit) as caught:
    main(["analyze", "run", "--data=code", f"{option}={given}"])
  assert caught.value.code == 2
  assert re.search(
    rf"{option}: '{given}' is no (whole )?number", capsys.readouterr().err
  )


def test_names_of_domains():
  assert text.parse_domains(["a=x.txt", "b=y"]) == {"a": ["x.txt"], "b": ["y"]}
  assert text.parse_domains(["texts/c4_en.txt.gz"]) == {
    "c4_en": ["texts/c4_en.txt.gz"]
  }
  assert text.parse_domains(["./a=b/c.txt"]) == {"c": ["./a=b/c.txt"]}
  with pytest.raises(ConfigError, match="is not NAME=FILE"):
    text.parse_domains([" =x"])


def test_tokens_are_a_limit(tmp_path):
  run = analysis.load(make_run(tmp_path / "run"))
  plan = analysis.Plan(make_texts(tmp_path), tokens=5 * 32 * 2, batch_size=2)
  found = analysis.survey(run, plan, words=False)
  for tally in found.domains.values():
    assert 4 * 32 < tally.tokens <= 5 * 32


def test_each_picture_can_be_drawn_from_python(tmp_path):
  run = analysis.load(make_run(tmp_path / "run"))
  found = analysis.survey(run, analysis.Plan(make_texts(tmp_path)))
  for result in (
    analysis.co_activation(found), analysis.domain_specialisation(found),
    analysis.vocabulary_specialisation(found), analysis.expert_load([found]),
    analysis.entropy([found]),
  ):  # fmt: skip
    figure = analysis.draw(result)
    assert len(figure.get_axes()) >= 1
    for chart in page.charts(result):
      with plot_style():
        narrow = new_figure(*chart.narrow_size)
        chart.draw(narrow, True)
        narrow.draw_without_rendering()


def test_a_mesh_finds_the_same(trained, monkeypatch):
  """Eight devices, each with parts of rows, weights and experts."""
  monkeypatch.chdir(trained)
  args = [
    "analyze", "run:all", "--data=papers=text/arxiv.txt",
    "--data=text/wikipedia.txt", "--tokens=8000", "--min-count=5",
    "--sample=32", "--output=meshed",
  ]  # fmt: skip
  mesh = ["--config.parallel.fsdp=2", "--config.parallel.expert=4"]
  assert main([*args, *mesh]) == 0
  read = lambda folder: json.loads((folder / "summary.json").read_text())
  want, got = read(trained / "run" / "analysis"), read(trained / "meshed")
  assert_alike(got, want)


def assert_alike(got, want):
  """Counts exactly, floats up to rounding."""
  if isinstance(want, dict):
    assert got.keys() == want.keys()
    for key, value in want.items():
      assert_alike(got[key], value)
  elif isinstance(want, list):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
      assert_alike(one, other)
  elif isinstance(want, float):
    assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
  else:
    assert got == want


@pytest.mark.parametrize(
  "option, message",
  [
    ("--config.model.d_model=3", "the checkpoint's config stays as it is"),
    ("--config.parallel.fsdp=3", "is a mesh of 3 devices"),
    ("--bogus=1", "unknown argument '--bogus=1'"),
  ],
)
def test_what_is_no_mesh(tmp_path, monkeypatch, capsys, option, message):
  run, domains = make_run(tmp_path / "run"), make_texts(tmp_path)
  data = [f"--data={name}={paths[0]}" for name, paths in domains.items()]
  monkeypatch.chdir(tmp_path)
  assert main(["analyze", str(run), *data, "--tokens=2000", option]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
