# SPDX-License-Identifier: Apache-2.0
"""transformers' auxiliary losses follow from our sums; docs/losses.md says how.

They are other losses than the papers': this shows that each difference is one
of form, and none of what the routers did.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.config import Config
from moejax.models import Rows, build
from moejax.step import batch_sums
from tests.convert import families as hf
from tests.convert.test_hf_parity import (
  EACH,
  reference,
  relative_error,
  to_tree,
)

WITHOUT = ("hunyuan_v1_moe", "deepseek_v3")  # they have no such loss
WEIGHT = 0.7  # so large that a wrong gradient of it would show


def stats_of(family):
  tokens, _ = hf.inputs()
  positions = jnp.tile(jnp.arange(hf.T), (hf.B, 1))
  rows = Rows(jnp.ones((hf.B, hf.T), jnp.int32), positions)
  apply = jax.jit(build(family.config).apply)
  variables = to_tree(family, hf.tensors(family))
  return apply(variables, jnp.asarray(tokens), rows).stats


def pooled(stats, times_L):
  """E sum_e f_e P_e over the tokens of all routers, some more than once."""
  times_L = jnp.asarray(times_L, jnp.float32)
  tokens = (times_L * stats.tokens_B.sum(1)).sum()
  share_E = times_L @ stats.count_BE.sum(1) / tokens
  mean_E = times_L @ stats.prob_BE.sum(1) / tokens
  return len(share_E) * (share_E * mean_E).sum()


def times(family, stats):
  """JetMoE's attention routers, the first of each layer, count twice."""
  L = stats.z_B.shape[0]
  return [2, 1] * (L // 2) if family.name == "jetmoe" else [1] * L


@EACH
def test_their_loss_from_our_sums(family):
  want = reference(family)
  if family.name in WITHOUT:
    assert "aux_loss" not in want
    return
  stats = stats_of(family)
  theirs = pooled(stats, times(family, stats))
  assert theirs == pytest.approx(want["aux_loss"], rel=1e-6)
  if family.name == "jetmoe":
    once = pooled(stats, [1] * stats.z_B.shape[0])
    assert abs(once / want["aux_loss"] - 1) > 1e-5


@EACH
@pytest.mark.hf
def test_gradients_of_the_training_loss(family):
  """Language-model loss and auxiliary loss, through what a step computes."""
  pytest.importorskip("transformers", reason="the [hf] extra is not installed")
  pytest.importorskip("torch", reason="the [hf] extra is not installed")
  config = Config(model=family.config)
  off = {"load_balance": 0.0, "router_z": 0.0}
  config = dataclasses.replace(
    config, loss=dataclasses.replace(config.loss, **off)
  )
  tokens, _ = hf.inputs()
  last = np.arange(hf.T) == hf.T - 1
  batch = {
    "tokens": tokens, "targets": np.roll(tokens, -1, 1),
    "segment_ids": np.ones_like(tokens),
    "positions": np.tile(np.arange(hf.T), (hf.B, 1)),
    "loss_mask": np.tile(~last, (hf.B, 1)),
  }  # fmt: skip

  @jax.jit
  def loss_and_gradients(variables, batch):
    def loss(params):
      sums, stats = batch_sums(
        config,
        build(family.config),
        variables | {"params": params},
        batch,
        None,
      )
      value, _ = losses.total_loss(config.loss, sums, stats)
      if family.name in WITHOUT:
        return value
      return value + WEIGHT * pooled(stats, times(family, stats))

    return jax.value_and_grad(loss)(variables["params"])

  variables = to_tree(family, hf.tensors(family))
  loss, grads = loss_and_gradients(variables, batch)
  their_loss, theirs = hf.loss_and_gradients(family, WEIGHT)
  assert loss == pytest.approx(their_loss, rel=1e-6)
  want = to_tree(family, theirs)["params"]
  errors = jax.tree.map(relative_error, grads, want)
  assert max(jax.tree.leaves(errors)) < 2e-5, errors


def test_one_layer_is_k_times_ours():
  """And two layers are not: theirs multiplies averages over layers."""
  family = next(f for f in hf.FAMILIES if f.name == "olmoe")
  stats = stats_of(family)
  one = jax.tree.map(lambda x: x[:1], stats)
  ours = losses.load_balance(one, "global")
  assert pooled(one, [1]) == pytest.approx(hf.X * float(ours), rel=1e-6)
  both = losses.load_balance(stats, "global")
  assert abs(pooled(stats, [1, 1]) / (hf.X * both) - 1) > 0.05


def test_at_perfect_balance():
  """The table of docs/losses.md: theirs k, ours 1, JetMoE's 2 a layer."""
  E, k, L, T = 4, 2, 3, 8
  even = losses.RouterStats(
    count_BE=jnp.full((L, 1, E), k * T / E),
    chosen_BE=jnp.full((L, 1, E), k * T / E),
    wanted_BE=jnp.full((L, 1, E), k * T / E),
    prob_BE=jnp.full((L, 1, E), T / E), z_B=jnp.zeros((L, 1)),
    entropy_B=jnp.zeros((L, 1)), dropped_B=jnp.zeros((L, 1)),
    unrouted_B=jnp.zeros((L, 1)),
    tokens_B=jnp.full((L, 1), float(T)),
  )  # fmt: skip
  assert pooled(even, [1] * L) == pytest.approx(k)
  for scope in ("global", "sequence"):
    assert losses.load_balance(even, scope) == pytest.approx(1)
