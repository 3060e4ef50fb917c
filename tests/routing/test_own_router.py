# SPDX-License-Identifier: Apache-2.0
"""A router that a notebook defines anew is the one that is used."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest

from moejax.analysis import choices
from moejax.config import Config, default_config
from moejax.data.tokenizer import load_tokenizer
from moejax.evaluate import evaluate_batches
from moejax.memory import compile_step
from moejax.models import build, init_variables
from moejax.parallel import make_mesh
from moejax.routing import Routing
from moejax.step import BATCH_KEYS, init_state, state_shardings
from moejax.train import fresh_state

E = 4


def always(expert):
  """A router that sends all tokens to one expert."""

  def router(logits_TE, mask_T, *, k=1, rng=None):
    expert_T1 = jax.numpy.full((len(mask_T), k), expert)
    prob_TE = jax.nn.softmax(logits_TE)
    weight_T1 = jax.numpy.take_along_axis(prob_TE, expert_T1, axis=-1)
    return Routing.from_token_choice(expert_T1, weight_T1, logits_TE, mask_T)

  return router


@pytest.fixture
def notebook(monkeypatch):
  module = types.ModuleType("some_notebook")
  monkeypatch.setitem(sys.modules, "some_notebook", module)
  return module


@pytest.fixture
def config():
  c = default_config()
  m = c.model
  m.vocab_size, m.d_model, m.num_layers = 259, 16, 1
  m.num_heads = m.num_kv_heads = 2
  m.head_dim, m.dtype = 8, "float32"
  m.moe.num_experts, m.moe.d_expert = E, 8
  m.moe.router = "some_notebook.router(k=1)"
  c.data.seq_len, c.train.batch_size = 8, 2
  return Config.from_dict(c)


def test_defined_anew(notebook, config):
  B, T = 2, 8
  ones_BT = np.ones((B, T), np.int32)
  batch = dict.fromkeys(BATCH_KEYS, ones_BT) | {"loss_mask": ones_BT > 0}
  batch["positions"] = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  tokenizer = load_tokenizer("byte")
  variables, losses = None, []
  for expert in (0, 3):
    notebook.router = always(expert)
    model = build(config.model)
    if variables is None:
      variables = init_variables(model, jax.random.key(0))
    made = choices(model, variables, ones_BT)
    assert (np.asarray(made.top_BT) == expert).all()
    found = evaluate_batches(config, model, variables, [batch], tokenizer)
    losses.append(found["xent"])
  assert losses[0] != losses[1]


def test_seeds_share_a_program_and_routers_do_not(notebook, config):
  mesh = make_mesh(config.parallel)

  def compiled(seed):
    return compile_step(
      dataclasses.replace(config, seed=seed), build(config.model), mesh
    )

  notebook.router = always(0)
  first = compiled(0)
  assert compiled(1) is first
  notebook.router = always(3)
  assert compiled(0) is not first


def test_a_run_begins_with_the_weights_of_its_seed(notebook, config):
  """Though the seed is no constant of the program that draws them."""
  notebook.router = always(0)
  model, mesh = build(config.model), make_mesh(config.parallel)
  tables = []
  for seed in (0, 1):
    of_seed = dataclasses.replace(config, seed=seed)
    where = state_shardings(of_seed, model, mesh)
    state = fresh_state(of_seed, model, load_tokenizer("byte"), where)
    want = jax.jit(lambda of_seed=of_seed: init_state(of_seed, model))()
    jax.tree.map(np.testing.assert_array_equal, state.params, want.params)
    tables.append(np.asarray(state.params["w_embed_VD"]))
  assert (tables[0] != tables[1]).any()
