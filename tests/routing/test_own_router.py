# SPDX-License-Identifier: Apache-2.0
"""A router that a notebook defines anew is the one that is used."""

import sys
import types

import jax
import numpy as np
import pytest

from moejax.analysis import choices
from moejax.config import Config, default_config
from moejax.data.tokenizer import load_tokenizer
from moejax.evaluate import evaluate_batches
from moejax.models import build, init_variables
from moejax.routing import Routing
from moejax.step import BATCH_KEYS

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


def test_the_same_one_shares_its_programs(notebook, config):
  notebook.router = always(0)
  assert build(config.model) == build(config.model)
