# SPDX-License-Identifier: Apache-2.0
"""Token stores that vanish, readers that die, runs that would read others."""

import shutil

import pytest

from moejax.__main__ import main
from tests.faults import faulty
from tests.small_run import moejax
from tests.test_train import assert_same_run, lines, train


def shard_of(place):
  (shard,) = place.glob("token_store/text-*/*-train.array_record-*")
  return shard


def test_a_shard_vanishes(place, unbroken):
  shard = shard_of(place)
  away = place / "away"
  fault = faulty.option(7, "move", f"{shard} {away}")
  done = train(place, "shard", *fault)
  # It may hold the file open; what it read then is what was there.
  assert done.returncode in (0, 2), done.stderr
  if done.returncode == 0:
    assert_same_run(place / "shard", unbroken)
  else:
    assert shard.name in done.stderr.splitlines()[-1]
  missing = train(place, "shard")
  assert missing.returncode == 2
  assert shard.name in missing.stderr and missing.stderr.count("\n") == 1
  shutil.move(away, shard)
  assert train(place, "shard").returncode == 0
  assert_same_run(place / "shard", unbroken)


def test_a_reader_process_hangs(place, unbroken):
  """As on a network disk that does not answer."""
  more = ["--config.data.num_workers=2", "--config.data.prefetch_rows=1"]
  done = train(
    place, "hanging", *more, "--config.data.timeout=20",
    *faulty.option(7, "kill_reader", "SIGSTOP"),
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  assert "no batch has come for 20 s (data.timeout)" in done.stderr
  again = train(place, "hanging", *more)
  assert again.returncode == 0, again.stderr
  assert_same_run(place / "hanging", unbroken)


def test_a_reader_process_is_killed(place, unbroken):
  more = ["--config.data.num_workers=2", "--config.data.prefetch_rows=1"]
  done = train(
    place, "reader", *more, *faulty.option(7, "kill_reader", "SIGKILL")
  )
  assert done.returncode == 2, done.stderr
  # Python's own tracker of shared memory may say more after it.
  assert "moejax train: a reader process died" in done.stderr
  again = train(place, "reader", *more)
  assert again.returncode == 0, again.stderr
  assert_same_run(place / "reader", unbroken)


@pytest.mark.parametrize(
  "option, message",
  [
    ("seed=1", "seed: 0 -> 1"),
    ("train.batch_size=8", "train.batch_size: 4 -> 8"),
    ("data.order=1", "data.order: 0 -> 1"),
    ("data.weights=(2.0,)", "data.weights: [] -> [2.0]"),
    ("data.exhausted=reweight", "data.exhausted: 'repeat' -> 'reweight'"),
    ("model.num_layers=3", "model.num_layers: 2 -> 3"),
    ("model.moe.num_experts=8", "model.moe.num_experts: 4 -> 8"),
    ("model.d_model=64", "model.d_model: 32 -> 64"),
    ("model.vocab_size=384", "model.vocab_size: 259 -> 384"),
    ("model.dtype=bfloat16", "model.dtype: 'float32' -> 'bfloat16'"),
    ("optimizer.name=muon", "optimizer.name: 'adamw' -> 'muon'"),
    ("optimizer.mu_dtype=bfloat16", "optimizer.mu_dtype: 'float32' -> 'bfl"),
    ("optimizer.weight_decay=0.2", "optimizer.weight_decay: 0.1 -> 0.2"),
    ("stability.spike=6.0", "stability.spike: 0.0 -> 6.0"),
    ("loss.z_loss=0.1", "loss.z_loss: 0.0 -> 0.1"),
  ],
)  # fmt: skip
def test_another_config_on_resume(
  place, unbroken, option, message, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  before = lines(unbroken)
  args = ["train", "--config=config.py", "--workdir=unbroken"]
  assert main([*args, f"--config.{option}"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert lines(unbroken) == before


def test_another_tokenizer_under_the_same_name(place, tmp_path):
  """Of the same size, in the same file: the digest alone tells."""
  make = ["data", "train-tokenizer", "--vocab-size=280"]
  for corpus, words in (("one", "abab"), ("two", "cdcd")):
    (tmp_path / f"{corpus}.txt").write_text(f"{words} " * 3000)
    done = moejax(tmp_path, *make, f"--sources={corpus}.txt",
                  f"--output={corpus}.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
  shutil.copy(place / "config.py", tmp_path)
  shutil.copytree(place / "text", tmp_path / "text")
  options = ["--config=config.py", "--config.data.tokenizer=own.json",
             "--config.model.vocab_size=288",
             "--config.train.num_steps=6",
             "--config.optimizer.schedule.decay=0"]  # fmt: skip
  for name in ("one", "two"):
    shutil.copy(tmp_path / f"{name}.json", tmp_path / "own.json")
    done = moejax(tmp_path, "data", "prepare", *options)
    assert done.returncode == 0, done.stderr
    last = moejax(tmp_path, "train", "--workdir=run", *options)
    if name == "one":
      assert last.returncode == 0, last.stderr
  assert last.returncode == 2
  assert "the tokenizer changed since step 6 (sha256 " in last.stderr
