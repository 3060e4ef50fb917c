# SPDX-License-Identifier: Apache-2.0
"""What upcycling refuses, and goes on with; the command from end to end."""

import json
import shutil

import jax
import numpy as np
import pytest

from moejax import runs
from moejax.checkpoint import CheckpointReader
from moejax.convert.from_hf import from_hf
from moejax.convert.to_hf import to_hf
from moejax.convert.upcycle import Recipe, upcycle
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import CheckpointError, ConfigError, DataError
from moejax.resume import refuse_converted
from tests.convert import families as hf
from tests.convert.dense_runs import (
  PLAIN,
  at,
  dense,
  dense_run,
  error,
  leaves,
  sparse,
)
from tests.convert.hub_folder import write
from tests.convert.test_round_trip import stop_after
from tests.small_run import make_place, moejax

REFUSED = [
  ({}, {"d_model": 32}, 1, "is not the model of .*: model.d_model: 24 -> 32;"),
  ({}, {"vocab_size": 300}, 1, "model.vocab_size: 259 -> 300"),
  ({}, {"num_kv_heads": 4}, 1, "model.num_kv_heads: 2 -> 4"),
  ({}, {"norm": "layer"}, 1, "model.norm: 'rms' -> 'layer'"),
  ({}, {"tie_embeddings": True}, 1, "model.tie_embeddings: False -> True"),
  ({}, {"qk_norm": "none"}, 1, "model.qk_norm: 'full' -> 'none'"),
  ({}, {"rope_theta": 7.0}, 1, "model.rope_theta: 10000.0 -> 7.0"),
  ({}, {"num_layers": 6}, 1, "model.num_layers: 4 -> 6"),
  (
    {},
    {"pattern": ("attention/mlp", "attention/moe"), "d_mlp": 64},
    1,
    "model.d_mlp: 32 -> 64",
  ),
  (
    {"qk_norm": "none"},
    {"pattern": ("attention/moe", "shared_kv/moe"), "qk_norm": "none"},
    1,
    "layer 1 is shared_kv/moe, that of .* attention/mlp; use attention/moe",
  ),
  ({}, {"pattern": ("attention/mlp",)}, 1, "no MoE layer; set model.pattern"),
  (
    {"pattern": ("attention/mlp", "attention/moe")},
    {},
    1,
    "is not dense: layer 1 is attention/moe; .* all /mlp",
  ),
  (
    {},
    {"moe": {"d_expert": 20}},
    1,
    "d_expert=20 times .*=32; use d_expert=32",
  ),
  ({}, {}, 2, "d_expert=32 times --granularity=2 is .*=32; use d_expert=16"),
  ({}, {}, 3, "--granularity=3 .* use a granularity that divides 32"),
  (
    {},
    {"moe": {"d_expert": 8, "num_experts": 10}},
    4,
    "num_experts=10 is not a multiple of --granularity=4; use 12",
  ),
  ({}, {"moe": {"num_shared_experts": 1}}, 1, "num_shared_experts=1.*use 0"),
  (
    {},
    {"moe": {"router": "top_k(k=1, renormalize=True)"}},
    1,
    "renormalize=True with k=1",
  ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return dense_run(tmp_path_factory.mktemp("source") / "dense")


def test_rope_is_that_of_the_checkpoints_phase(tmp_path):
  source = dense_run(tmp_path / "dense")
  record = json.loads((source / "config.json").read_text())
  record["config"]["train"]["phases"] = [
    {"name": "a", "steps": 5, "options": {"model.rope_theta": 7.0}},
    {"name": "b"},
  ]
  (source / "config.json").write_text(json.dumps(record))
  with pytest.raises(ConfigError, match="model.rope_theta: 7.0 -> 10000.0"):
    upcycle(source, sparse(), tmp_path / "other", PLAIN)
  upcycle(source, sparse(rope_theta=7.0), tmp_path / "sparse", PLAIN)
  assert error(tmp_path / "sparse", source) < 1e-5


@pytest.mark.parametrize("theirs, ours, granularity, message", REFUSED)
def test_what_does_not_fit_is_refused(
  theirs, ours, granularity, message, source, tmp_path
):
  # It is refused before any weight is read: these are another model's.
  shutil.copytree(source / "checkpoints", tmp_path / "dense" / "checkpoints")
  runs.write_files(tmp_path / "dense", dense(**theirs), ByteTokenizer())
  with pytest.raises(ConfigError, match=message) as e:
    upcycle(
      tmp_path / "dense", sparse(**ours), tmp_path / "moe", Recipe(granularity)
    )
  assert "\n" not in str(e.value)
  assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"granularity": 0}, "--granularity=0 must be positive"),
    ({"noise": 1.5}, "--noise=1.5 is a share"),
    ({"noise": -0.1}, "--noise=-0.1 is a share"),
    ({"noise_std": 0.0}, "--noise-std=0.0 must be positive"),
  ],
)
def test_impossible_recipes(options, message):
  with pytest.raises(ConfigError, match=message):
    Recipe(**options)


def test_folders_that_are_not_there_or_taken(source, tmp_path):
  with pytest.raises(DataError, match="nowhere is not the folder of a run"):
    upcycle(tmp_path / "nowhere", sparse(), tmp_path / "moe", PLAIN)
  with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN, step=7)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").touch()
  with pytest.raises(
    ConfigError, match="is not empty .it has thesis.tex.; use"
  ):
    upcycle(source, sparse(), tmp_path / "full", PLAIN)
  with pytest.raises(
    ConfigError, match="holds another checkpoint; use another"
  ):
    upcycle(source, sparse(), source, PLAIN)


def test_another_tokenizer_is_not_taken_over(tmp_path):
  source = dense_run(tmp_path / "dense")
  for file in source.glob("tokenizer*"):
    file.unlink()
  write(tmp_path / "hub", hf.FAMILIES[0])
  shutil.copy(tmp_path / "hub" / "tokenizer.json", source)
  with pytest.raises(CheckpointError, match="is not the one step 3 was"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  assert not (tmp_path / "moe").exists()


def test_a_stopped_one_goes_on(source, tmp_path, monkeypatch, capsys):
  recipe = Recipe(noise=0.5)
  upcycle(source, sparse(), tmp_path / "whole", recipe)
  with monkeypatch.context() as m:
    stop_after(m, 20)
    with pytest.raises(KeyboardInterrupt):
      upcycle(source, sparse(), tmp_path / "moe", recipe)
  assert not (tmp_path / "moe" / "config.json").exists()
  with pytest.raises(CheckpointError, match="holds unfinished work on"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  with monkeypatch.context() as m:
    done = stop_after(m, 1000)
    upcycle(source, sparse(), tmp_path / "moe", recipe)
  one, two = leaves(tmp_path / "moe"), leaves(tmp_path / "whole")
  assert len(done) == len(one) - 20
  jax.tree.map(np.testing.assert_array_equal, one, two)
  upcycle(source, sparse(), tmp_path / "moe", recipe)
  assert "holds this checkpoint already" in capsys.readouterr().out


def test_it_says_where_it_comes_from(source, tmp_path):
  recipe = Recipe(noise=0.25, noise_std=0.1)
  upcycle(source, sparse(seed=9), tmp_path / "moe", recipe)
  meta = CheckpointReader(tmp_path / "moe" / "checkpoints").read_meta()
  assert meta["upcycled_from"] == {
    "run": str(source), "step": 3, "granularity": 1, "noise": 0.25,
    "noise_std": 0.1, "seed": 9,
  }  # fmt: skip
  with pytest.raises(CheckpointError, match="holds converted weights, not a"):
    refuse_converted(tmp_path / "moe")


def test_the_hub_takes_it(tmp_path):
  """And gives the same model back."""
  source = dense_run(tmp_path / "dense", qk_norm="none")
  upcycle(source, sparse(qk_norm="none"), tmp_path / "moe", PLAIN)
  to_hf(tmp_path / "moe", tmp_path / "hub", family="mixtral")
  from_hf(tmp_path / "hub", tmp_path / "again")
  assert error(tmp_path / "again", source) < 1e-5


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
  """Train densely, upcycle, the same validation loss, train on."""
  place = make_place(tmp_path)

  def run(*args):
    done = moejax(place, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout

  file, steps = "--config=config.py", "--config.train.num_steps=20"
  short = "--config.optimizer.schedule.decay=5.0"
  dense = ("--config.model.pattern=attention/mlp", "--config.model.d_mlp=32")
  run("train", file, "--workdir=dense", steps, short, *dense)
  experts = "--config.model.moe.d_expert=16"
  router = "--config.model.moe.router=top_k(k=2, renormalize=True)"
  out = run(
    "convert", "upcycle", "dense", file, experts, router, "--output=moe",
    "--granularity=2",
  )  # fmt: skip
  assert "logits are the dense model's" in out
  one, two = (
    json.loads(run("eval", name, "--json").splitlines()[-1])["xent"]
    for name in ("dense", "moe")
  )
  assert abs(two / one - 1) < 1e-5
  assert run("generate", "moe", "--prompt=the", "--max-tokens=4")
  init = "--config.train.init_from=moe"
  run("train", file, "--workdir=on", steps, short, router, init)
  lines = (place / "on" / "metrics.jsonl").read_text().splitlines()
  losses = [x["loss/xent"] for x in map(json.loads, lines) if "loss/xent" in x]
  assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
  before, after = leaves(place / "moe"), leaves(place / "on")
  name = at(0, "moe/w_up_EDF")
  moved = np.abs(after[name.replace("repeats_0", "repeats")][0] - before[name])
  assert (moved.max((1, 2)) > 0).all()
  done = moejax(place, "train", file, "--workdir=moe", router)
  assert done.returncode == 2 and "holds converted weights" in done.stderr
  done = moejax(place, "convert", "upcycle", "dense", file, "--output=new")
  assert done.returncode == 2
  assert done.stderr.startswith("moejax convert: model.moe.d_expert=16 times")
