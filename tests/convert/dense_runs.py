# SPDX-License-Identifier: Apache-2.0
"""Small dense runs, and what upcycling made of them."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import runs
from moejax.checkpoint.leaves import named_leaves
from moejax.config import Config
from moejax.convert.upcycle import Recipe
from moejax.models import Rows, build, init_variables
from tests.fresh_run import fresh_run

L, D, F, V = 4, 24, 32, 259
B, T = 4, 64
RENORMALIZED = "top_k(k=2, renormalize=True)"
PLAIN = Recipe()


def config_of(pattern, seed=0, moe=None, **model):
  """A small model; sizes differ, so that no transpose goes unnoticed."""
  sizes = {
    "vocab_size": V, "d_model": D, "num_layers": L, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 10, "d_mlp": F, "dtype": "float32",
    "init_std": 0.2, "scan_layers": False, "pattern": pattern,
  }  # fmt: skip
  moe = {"num_experts": 8, "d_expert": F, "router": RENORMALIZED} | (moe or {})
  return Config.from_dict({"seed": seed, "model": sizes | {"moe": moe} | model})


def sparse(pattern=("attention/moe",), **options):
  return config_of(pattern, **options)


def dense(pattern=("attention/mlp",), **options):
  return config_of(pattern, **options)


def dense_run(folder, dtype=np.float32, **options):
  """A run in which no weight is as it is drawn, gains included."""
  config = dense(**options)
  shapes = jax.eval_shape(
    lambda: init_variables(build(config.model), jax.random.key(0))
  )
  rng = np.random.default_rng(1)
  draw = lambda x: (rng.normal(0, 0.3, x.shape) + (x.ndim == 1)).astype(dtype)
  return fresh_run(folder, config, jax.tree.map(draw, shapes))


def logits(folder):
  run = runs.load_run(folder)
  tokens = np.random.default_rng(0).integers(0, V, (B, T))
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))
  hidden = run.model.apply(run.variables, tokens, rows).hidden_BTD
  return np.asarray(run.model.apply(run.variables, hidden, method="logits"))


def error(folder, source):
  """Relative, of the logits."""
  got, want = logits(folder), logits(source)
  return np.abs(got - want).max() / np.abs(want).max()


def leaves(folder):
  """Arrays of a run by name."""
  variables = runs.load_run(folder).variables
  return {k: np.asarray(v) for k, v in named_leaves(variables).items()}


def at(layer, name):
  """A leaf's name in a stack of one kind of layer, layers apart."""
  return f"params/repeats_{layer}/block_0/{name}"
