# SPDX-License-Identifier: Apache-2.0
"""A small state with everything that real ones have, and its helpers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def make_state(seed: int = 0):
  """Nested params in two dtypes, AdamW moments and counts, biases, keys."""
  rng = np.random.default_rng(seed)
  key = jax.random.key(seed)

  def normal(*shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  params = {
    "embed": normal(24, 8, dtype=jnp.float32),
    "layers": {"w_EDF": normal(8, 4, 16, dtype=jnp.bfloat16)},
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    "params": params,
    "opt_state": optimizer.init(params),
    "router_state": {"bias_E": jnp.arange(8, dtype=jnp.float32) * seed},
    "rng": {"key": key, "keys": jax.random.split(key, 2)},
    "skipped": jnp.int32(seed),
    "flags": jnp.array([True, False]),
    "empty": {},
  }


def make_abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


@pytest.fixture
def example():
  """`example.state(seed)`, `example.abstract(state)`."""
  return types.SimpleNamespace(state=make_state, abstract=make_abstract)
