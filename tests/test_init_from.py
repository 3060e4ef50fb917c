# SPDX-License-Identifier: Apache-2.0
"""Starting from another run's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import runs
from moejax.cli import load_config_file
from moejax.config import Config
from moejax.convert.from_hf import from_hf
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import CheckpointError, ConfigError
from moejax.generate import prompt_tokens
from moejax.init_from import weights_of
from moejax.models import Rows, build
from moejax.parallel import make_mesh
from moejax.step import state_shardings
from moejax.train import fresh_state, train
from tests.convert import families as hf
from tests.convert.hub_folder import write
from tests.fresh_run import fresh_run
from tests.test_published import CONFIGS

WORDS = ByteTokenizer()


def config_with(**model):
  values = load_config_file(f"{CONFIGS}/qwen3_30b_a3b.py:tiny")
  values.model.update(model)
  return values


def hidden(config, variables):
  tokens = jnp.array([prompt_tokens(WORDS, "def f(x):")])
  B, T = tokens.shape
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.arange(T)[None])
  return build(config.model).apply(variables, tokens, rows).hidden_BTD


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("source_scans", [True, False])
def test_the_model_is_the_same(scan_layers, source_scans, tmp_path):
  theirs = Config.from_dict(config_with(scan_layers=source_scans))
  run = fresh_run(tmp_path / "run", theirs)
  values = config_with(scan_layers=scan_layers)
  values.train.init_from = str(run)
  ours = Config.from_dict(values)
  got = hidden(ours, weights_of(ours, WORDS))
  want = hidden(theirs, runs.load_run(run).variables)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_average_begins_with_the_weights(tmp_path):
  values = config_with()
  run = fresh_run(tmp_path / "run", Config.from_dict(values))
  values.train.init_from, values.optimizer.ema = str(run), 0.999
  values.seed = 7
  config = Config.from_dict(values)
  model, mesh = build(config.model), make_mesh(config.parallel)
  state = fresh_state(
    config, model, WORDS, state_shardings(config, model, mesh)
  )
  jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_what_does_not_fit_is_named(tmp_path, capsys):
  run = fresh_run(tmp_path / "run", Config.from_dict(config_with()))
  values = config_with(rope_theta=7.0)
  values.train.init_from = str(run)
  weights_of(Config.from_dict(values), WORDS)
  out = capsys.readouterr().out
  assert "note: changed since: model.rope_theta: 1000000.0 -> 7.0" in out
  values.model.vocab_size += 1
  with pytest.raises(ConfigError, match=r"w_embed_VD is float32\[331,.*\[332,"):
    weights_of(Config.from_dict(values), WORDS)
  values = config_with(num_layers=2)
  values.train.init_from = str(run)
  with pytest.raises(ConfigError, match="is only there"):
    weights_of(Config.from_dict(values), WORDS)


def test_a_converted_folder_is_not_trained_in(tmp_path):
  from_hf(write(tmp_path / "hub", hf.FAMILIES[0]), tmp_path / "run")
  with pytest.raises(CheckpointError, match="converted weights.*init_from"):
    train(runs.read_config(tmp_path / "run"), tmp_path / "run")


def test_bfloat16_weights_become_float32(tmp_path):
  hub = write(tmp_path / "hub", hf.FAMILIES[0])
  from_hf(hub, tmp_path / "run", dtype="bfloat16")
  values = runs.read_config(tmp_path / "run").to_dict()
  values["train"]["init_from"] = str(tmp_path / "run")
  found = weights_of(
    Config.from_dict(values), runs.read_tokenizer(tmp_path / "run")
  )
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
