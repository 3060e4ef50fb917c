# SPDX-License-Identifier: Apache-2.0
"""The published systems in small: a few steps on one batch, the loss falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import build
from moejax.step import init_state, make_train_step
from tests.test_published import read

B, T, STEPS = 2, 32, 6
# The other configs are made of the same parts.
SYSTEMS = (
  "olmoe_1b_7b",
  "jetmoe_8b",
  "dbrx_132b",
  "hunyuan_large",
  "deepseek_v3",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_loss_of_a_batch_falls(name):
  config = read(name, ":tiny")
  once = len(config.model.prefix) + len(config.model.pattern)  # compiles faster
  router = config.model.moe.router.replace("size=256", f"size={T}")
  moe = dataclasses.replace(config.model.moe, router=router)
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, num_layers=once, moe=moe)
  )
  model = build(config.model)
  state = jax.jit(lambda: init_state(config, model))()
  row = np.random.default_rng(0).integers(0, 256, (B, T + 1))
  batch = {
    "tokens": row[:, :-1], "targets": row[:, 1:],
    "segment_ids": np.ones((B, T), np.int32),
    "positions": np.tile(np.arange(T), (B, 1)),
    "loss_mask": np.ones((B, T), bool),
    "source_ids": np.zeros((B, T), np.int32),
  }  # fmt: skip
  batch = jax.tree.map(jnp.asarray, batch)
  step = jax.jit(make_train_step(config, model))
  losses = []
  for _ in range(STEPS):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss/xent"]))
  assert losses[-1] < losses[0] - 0.01, losses
  routers = sum(layer.num_routers for layer in config.model.layers)
  assert metrics["load_LE"].shape == (routers, config.model.moe.num_experts)
