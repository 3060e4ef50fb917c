# SPDX-License-Identifier: Apache-2.0
"""Another router changes no other computation."""

import jax
import numpy as np
import pytest

from moejax.config import Config
from moejax.data import load_batches, open_stores
from moejax.data.tokenizer import load_tokenizer
from moejax.models import build
from moejax.routing import Routing, top_k
from moejax.step import device_batch, init_state, make_train_step
from tests.routing.test_probe import EXAMPLES
from tests.small_run import make_place

E = 8


def config_with(router, scan=True):
  return Config.from_dict({
    "seed": 3,
    "model": {
      "vocab_size": 259, "d_model": 16, "num_layers": 3, "num_heads": 2,
      "num_kv_heads": 2, "head_dim": 8, "dtype": "float32",
      "scan_layers": scan, "prefix": ("attention/mlp",),
      "moe": {"num_experts": E, "d_expert": 8, "router": router},
    },
    "data": {"sources": ("text",), "seq_len": 32, "validation_fraction": 0.1},
    "train": {"num_steps": 20, "batch_size": 4},
    "optimizer": {"schedule": {"warmup": 2.0, "decay": 2.0}},
  })  # fmt: skip


def weights(router, scan):
  config = config_with(router, scan)
  return init_state(config, build(config.model)).params


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("router", EXAMPLES.values(), ids=EXAMPLES)
def test_the_same_initial_weights_elsewhere(router, scan):
  want = by_path(weights("top_k(k=2)", scan))
  got = by_path(weights(router, scan))
  assert want.keys() <= got.keys()
  assert all("router" in path for path in got.keys() - want.keys())
  for path, x in want.items():
    np.testing.assert_array_equal(got[path], x, err_msg=path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("swap"))


def batches(config, number):
  stores = open_stores(config.data, load_tokenizer("byte"))
  with load_batches(
    stores, config.data, "train", config.train.batch_size, config.seed
  ) as found:
    return [next(found) for _ in range(number)]


def test_the_same_batches(place, monkeypatch):
  monkeypatch.chdir(place)
  want = batches(config_with("top_k(k=2)"), 3)
  for router in ("noisy_top_k(k=2)", "expert_choice(k=2, group_size=8)"):
    for got, one in zip(batches(config_with(router), 3), want, strict=True):
      jax.tree.map(np.testing.assert_array_equal, got, one)


def same_by_another_name(
  logits_TE, mask_T, *, k, token_T, position_T, rng=None
) -> Routing:
  """`top_k`, but given all that a router may ask for."""
  assert token_T.shape == position_T.shape == mask_T.shape
  return top_k(logits_TE, mask_T, k=k)


def test_the_same_steps(place, monkeypatch):
  """Where two routers decide alike, all is trained alike, bit by bit."""
  monkeypatch.chdir(place)

  def trained(router):
    config = config_with(router)
    model = build(config.model)
    step = jax.jit(make_train_step(config, model))
    state = init_state(config, model)
    for batch in batches(config, 3):
      state, metrics = step(state, device_batch(batch, model.placement))
    return by_path(state.params) | by_path(metrics)

  want = trained("top_k(k=2)")
  got = trained(f"{__name__}.same_by_another_name(k=2)")
  assert want.keys() == got.keys()
  for path, x in want.items():
    np.testing.assert_array_equal(got[path], x, err_msg=path)
