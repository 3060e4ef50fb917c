# SPDX-License-Identifier: Apache-2.0
"""Sources that end before the run does: repeated, refused, or shared out."""

import collections
import json

import numpy as np
import pytest

from moejax.__main__ import main
from moejax.cli import parse_config
from moejax.config import phases_of
from moejax.data import PhasedStores, load_tokenizer
from moejax.data.mixture import Mixture, without_exhausted
from moejax.errors import DataError
from tests.small_run import make_place

SOURCES = ["--config.data.sources=text,more", "--config.data.weights=1,1"]


PLANNED = [(0, [0.5, 0.3, 0.2]), (150, [0.2, 0.2, 0.6])]


def test_sources_are_left_out_where_they_end():
  sizes = [60, 1000, 90]
  found = without_exhausted(PLANNED, sizes, 500)
  mixture = Mixture(found)
  drawn = [mixture[row] for row in range(500)]
  counts = collections.Counter(source for source, _ in drawn)
  assert counts[0] == 60 and counts[2] == 90 and counts[1] == 350
  for source in range(3):  # each row once, in order
    assert [i for s, i in drawn if s == source] == list(range(counts[source]))
  # Exactly where it asks for one row too many.
  first = next(start for start, weights in found if weights[0] == 0)
  plain = Mixture(PLANNED)
  assert plain.counts(first)[0] == 60 and plain[first][0] == 0


def test_what_is_enough_stays_as_it_is():
  assert without_exhausted(PLANNED, [250, 150, 300], 500) == [
    (start, tuple(weights)) for start, weights in PLANNED
  ]


def test_no_source_left():
  with pytest.raises(ValueError) as found:
    without_exhausted([(0, [1.0, 2.0])], [10, 20], 31)
  assert found.value.args[1] == 30
  without_exhausted([(0, [1.0, 2.0])], [10, 20], 30)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("exhausted"))
  (place / "more").mkdir()
  for i in range(12):
    (place / "more" / f"{i}.txt").write_text(f"line {i} of more " * 8)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    prepare = ["data", "prepare", "--config=config.py", *SOURCES]
    assert main([*prepare, "--config.data.validation_fraction=0"]) == 0
  return place


@pytest.fixture(autouse=True)
def within(place, monkeypatch):
  monkeypatch.chdir(place)


def config_of(exhausted, steps, **more):
  options = [
    *SOURCES, f"--config.data.exhausted={exhausted}",
    f"--config.train.num_steps={steps}", "--config.eval.every=0",
    "--config.data.validation_fraction=0",
    "--config.optimizer.schedule.decay=0",
  ]  # fmt: skip
  options += [f"--config.{k.replace('__', '.')}={more[k]}" for k in more]
  return parse_config("config.py", options)


def open_stores(config):
  return PhasedStores.open(config, load_tokenizer("byte"))


def rows_of(stores):
  """All rows of a run, (source, row) in order."""
  found = []
  for phase in phases_of(stores.config):
    with stores.batches(phase, phase.start) as batches:
      for _ in range(phase.end - phase.start):
        batch = next(batches)
        found += zip(batch["source"].tolist(), batch["row"].tolist())
  return found


def sizes_of(stores):
  return [s.rows("train") for s in stores.stores[0].stores]


def test_repeated(place):
  stores = open_stores(config_of("repeat", 100))
  text, more = sizes_of(stores)
  assert more < 200 < 400 < 2 * text
  assert stores.describe_exhausted() == [f"more is read {200 / more:.2f} times"]
  counts = collections.Counter(rows_of(stores))
  assert max(counts.values()) == -(-200 // more)


def test_refused_with_the_step_that_is_the_last(place, capsys):
  stores = open_stores(config_of("repeat", 100))
  more = sizes_of(stores)[1]
  last = 2 * more // 4
  message = f"more has {more} rows, which end after step {last}: set train.num"
  with pytest.raises(DataError, match=message):
    open_stores(config_of("stop", 100))
  assert open_stores(config_of("stop", last))
  with pytest.raises(DataError, match=message):
    open_stores(config_of("stop", last + 1))
  options = [*SOURCES, "--config.data.validation_fraction=0",
             "--config.data.exhausted=stop", "--config.eval.every=0",
             "--config.train.num_steps=900"]  # fmt: skip
  assert main(["train", "--config=config.py", "--workdir=x", *options]) == 2
  assert message in capsys.readouterr().err


def test_shared_out(place):
  plain = open_stores(config_of("repeat", 100))
  text, more = sizes_of(plain)
  steps = (text + more) // 4
  stores = open_stores(config_of("reweight", steps))
  assert "more is read whole before the end" in stores.describe_exhausted()[0]
  rows = rows_of(stores)
  assert len(set(rows)) == len(rows)  # none twice
  assert np.bincount([s for s, _ in rows])[1] == more
  # A longer run reads the same rows first.
  shorter = rows_of(open_stores(config_of("reweight", steps - 20)))
  assert rows[: len(shorter)] == shorter
  with pytest.raises(DataError, match=f"read whole after step {steps}"):
    open_stores(config_of("reweight", steps + 1))


def test_shared_out_over_a_phase_switch(place):
  phases = [
    {"name": "a", "steps": 20},
    {"name": "b", "options": {"data.weights": [1.0, 4.0]}},
  ]
  text, more = sizes_of(open_stores(config_of("repeat", 100)))
  steps = (text + more) // 4
  config = config_of("reweight", steps, train__phases=json.dumps(phases))
  rows = rows_of(open_stores(config))
  assert len(set(rows)) == len(rows)
  assert np.bincount([s for s, _ in rows])[1] == more
