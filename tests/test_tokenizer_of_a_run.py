# SPDX-License-Identifier: Apache-2.0
"""A run's own copy of its tokenizer finds what the file it came from made."""

import json

import numpy as np
import pytest

from moejax.__main__ import main
from tests.small_run import make_place
from tests.test_train import lines

WORDS = [
  "--config=config.py", "--config.data.tokenizer=words/tokenizer.json",
  "--config.model.vocab_size=384",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("words"))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    train = ["data", "train-tokenizer", "--sources", "text"]
    assert main([*train, "--vocab-size=270", "--output=words"]) == 0
    assert main(["data", "prepare", *WORDS]) == 0
    steps = ["--config.train.num_steps=16", "--no-report",
             "--config.train.accumulation_steps=2"]  # fmt: skip
    assert main(["train", *WORDS, *steps, "--workdir=run"]) == 0
    yield place


def test_evaluation_and_replay(place, capsys, monkeypatch):
  monkeypatch.chdir(place)
  assert main(["eval", "run", "--json"]) == 0
  values = json.loads(capsys.readouterr().out)
  logged = json.loads(lines(place / "run", "eval.jsonl")[-1])
  np.testing.assert_allclose(values["xent"], logged["validation/xent"], 1e-5)
  assert main(["replay", "run", "--step=7"]) == 0
  assert "step 7" in capsys.readouterr().out


def test_batches_of_files_are_as_large_as_those_of_training(
  place, capsys, monkeypatch
):
  """Two of four rows of 32, whatever goes through the model at a time."""
  monkeypatch.chdir(place)
  assert main(["eval", "run", "--data=text", "--num-batches=2", "--json"]) == 0
  tokens = json.loads(capsys.readouterr().out)["tokens"]
  assert 6 * 32 < tokens <= 8 * 32
