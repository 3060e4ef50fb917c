# SPDX-License-Identifier: Apache-2.0
"""The parts that the grid's model lacks, split as far as they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.config import Config
from moejax.models import build, init_variables
from moejax.parallel import build_on_mesh, make_mesh
from moejax.step import batch_sums
from tests.invariance import cells
from tests.invariance.cells import B, T, V, batch, error, norm

MESHES = cells.MESHES | {"sequence2-tp2": {"sequence": 2, "tensor": 2}}

PARTS = {
  # Hunyuan-Large: keys of another layer.
  "shared keys": {
    "pattern": ("attention/moe", "shared_kv/mlp"),
    "qk_norm": "head_after_rope", "num_kv_heads": 2,
  },
  # OLMoE and DBRX: a norm over heads that are split, LayerNorm, clipping.
  "norms over all heads": {
    "pattern": ("attention/moe",), "qk_norm": "full", "num_kv_heads": 2,
    "norm": "layer", "clip_qkv": 0.5,
  },
  # DeepSeek-V3: one latent for all heads; a dense layer first.
  "latents": {
    "prefix": ("mla/mlp",), "pattern": ("mla/moe",), "num_kv_heads": 4,
    "mla": {
      "q_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "v_dim": 6
    },
    "head_dim": 12, "num_layers": 3, "qk_norm": "none",
  },
  # FlexOlmo and Qwen3: norms on outputs, norms per head, one table.
  "norms": {
    "pattern": ("attention/moe",), "norm_position": "post", "qk_norm": "head",
    "num_kv_heads": 2, "tie_embeddings": True, "scan_layers": False,
  },
  "blockwise attention": {
    "pattern": ("attention/moe",), "num_kv_heads": 2, "attention": "blockwise",
    "qk_norm": "none",
  },
}  # fmt: skip


def config_of(name, mesh, dispatch):
  return Config.from_dict({
    "model": {
      "vocab_size": V, "d_model": 32, "num_layers": 2, "num_heads": 4,
      "head_dim": 8, "d_mlp": 28, "dtype": "float32", "init_std": 0.1,
      "moe": {
        "num_experts": 8, "d_expert": 20, "router": "top_k(k=2)",
        "dispatch": dispatch,
      },
    } | PARTS[name],
    "data": {"seq_len": T},
    "train": {"batch_size": B, "accumulation_steps": 2},
    "parallel": MESHES[mesh],
  })  # fmt: skip


def loss_and_gradients(config):
  mesh = make_mesh(
    config.parallel, jax.devices()[: config.parallel.num_devices]
  )
  model = build_on_mesh(config, mesh)
  given = init_variables(build(config.model), jax.random.key(1))

  @jax.jit
  def compute(params, batch):
    def loss(params):
      sums, stats = batch_sums(config, model, {"params": params}, batch, None)
      return losses.total_loss(config.loss, sums, stats)[0]

    return jax.value_and_grad(loss)(params)

  return jax.device_get(compute(given["params"], batch()))


CASES = [
  *((name, mesh) for name in PARTS for mesh in ("fsdp2-ep2-tp2", "sequence2")),
  # Four devices a row: of two heads of keys they gather, four they split.
  ("shared keys", "sequence2-tp2"),
  ("blockwise attention", "sequence2-tp2"),
  ("latents", "sequence2-tp2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", CASES)
def test_split_or_not_it_is_the_same(name, mesh):
  loss, grads = loss_and_gradients(config_of(name, mesh, "ragged"))
  want, want_grads = loss_and_gradients(config_of(name, "one", "dense"))
  assert jnp.isfinite(loss)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert error(grads, want_grads, norm(want_grads)) < 2e-5
