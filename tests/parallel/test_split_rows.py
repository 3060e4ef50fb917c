# SPDX-License-Identifier: Apache-2.0
"""What goes between devices that split rows; results: tests/invariance."""

import jax
import jax.numpy as jnp
import pytest

from moejax.config import Config
from moejax.models import Rows, build, init_variables
from moejax.parallel import build_on_mesh, make_mesh


def program(kv_heads):
  config = Config.from_dict({
    "model": {
      "vocab_size": 62, "d_model": 32, "num_layers": 1, "num_heads": 4,
      "num_kv_heads": kv_heads, "head_dim": 8, "d_mlp": 28,
      "pattern": ("attention/mlp",), "dtype": "float32",
    },
    "data": {"seq_len": 32},
    "train": {"batch_size": 4},
    "parallel": {"sequence": 2},
  })  # fmt: skip
  model = build_on_mesh(config, make_mesh(config.parallel, jax.devices()[:2]))
  variables = init_variables(build(config.model), jax.random.key(0))
  ones, places = jnp.ones((4, 32), jnp.int32), jnp.tile(jnp.arange(32), (4, 1))
  rows = Rows(ones, places)
  run = jax.jit(
    lambda given, tokens: model.apply(given, tokens, rows).hidden_BTD
  )
  return run.lower(variables, ones).compile().as_text()


@pytest.mark.parametrize("kv_heads, moved", [(2, True), (1, False)])
def test_heads_that_divide_bring_whole_rows(kv_heads, moved):
  assert (" all-to-all(" in program(kv_heads)) == moved
