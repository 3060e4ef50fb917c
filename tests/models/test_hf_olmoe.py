# SPDX-License-Identifier: Apache-2.0
"""Logits and gradients against Hugging Face's OLMoE at a tiny random size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models import Rows, build, init_params
from tests.models import hf_olmoe as hf

L, D, N, K, H, F = hf.L, hf.D, hf.N, hf.K, hf.H, hf.F
CONFIG = ModelConfig(
  vocab_size=hf.V, d_model=D, num_layers=L, num_heads=N, num_kv_heads=K,
  head_dim=H, dtype="float32",
  moe=MoEConfig(num_experts=hf.E, d_expert=F, router=f"top_k(k={hf.X})"),
)  # fmt: skip


def to_moejax(t):
  """Our tree from tensors by hub name; linear, so it maps gradients too."""

  def stack(name, f=lambda w: w):
    layers = [f(t[f"model.layers.{i}.{name}"]) for i in range(L)]
    return jnp.asarray(np.stack(layers))

  heads = lambda name, n: stack(name, lambda w: w.T.reshape(D, n, H))
  gate_up = "mlp.experts.gate_up_proj"
  block = {
    "attention_norm": {"scale": stack("input_layernorm.weight")},
    "ffn_norm": {"scale": stack("post_attention_layernorm.weight")},
    "attention": {
      "w_q_DNH": heads("self_attn.q_proj.weight", N),
      "w_k_DKH": heads("self_attn.k_proj.weight", K),
      "w_v_DKH": heads("self_attn.v_proj.weight", K),
      "w_o_NHD": stack(
        "self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D)
      ),
      "q_norm": stack("self_attn.q_norm.weight"),
      "k_norm": stack("self_attn.k_norm.weight"),
    },
    "moe": {
      "w_router_DE": stack("mlp.gate.weight", np.transpose),
      "w_gate_EDF": stack(gate_up, lambda w: w[:, :F].swapaxes(1, 2)),
      "w_up_EDF": stack(gate_up, lambda w: w[:, F:].swapaxes(1, 2)),
      "w_down_EFD": stack("mlp.experts.down_proj", lambda w: w.swapaxes(1, 2)),
    },
  }
  return {
    "w_embed_VD": jnp.asarray(t["model.embed_tokens.weight"]),
    "w_output_VD": jnp.asarray(t["lm_head.weight"]),
    "final_norm": {"scale": jnp.asarray(t["model.norm.weight"])},
    "repeats": {"block_0": block},
  }


def relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.abs(got - want).max() / np.abs(want).max()


def test_the_mapped_tree_is_the_models_own():
  params = jax.eval_shape(lambda: init_params(build(CONFIG), jax.random.key(0)))
  mapped = to_moejax(hf.weights())
  assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
def test_logits_and_gradients_equal_hugging_face(dispatch):
  moe = dataclasses.replace(CONFIG.moe, dispatch=dispatch)
  model = build(dataclasses.replace(CONFIG, moe=moe))
  tokens, cotangent = hf.inputs()
  positions = jnp.tile(jnp.arange(hf.T), (hf.B, 1))
  rows = Rows(jnp.ones((hf.B, hf.T), jnp.int32), positions)

  @jax.jit
  def logits_and_gradients(params):
    def logits(params):
      out = model.apply({"params": params}, jnp.asarray(tokens), rows)
      return model.apply({"params": params}, out.hidden_BTD, method="logits")

    value, pull = jax.vjp(logits, params)
    return value, pull(jnp.asarray(cotangent))[0]

  logits, grads = logits_and_gradients(to_moejax(hf.weights()))
  hf_logits, hf_grads = hf.read()
  hf_grads = to_moejax(hf_grads)
  assert relative_error(logits, hf_logits) < 2e-6
  assert jax.tree.structure(grads) == jax.tree.structure(hf_grads)
  errors = jax.tree.map(relative_error, grads, hf_grads)
  assert max(jax.tree.leaves(errors)) < 1e-5, errors


@pytest.mark.hf
def test_the_stored_reference_is_what_transformers_computes():
  pytest.importorskip("transformers", reason="the [hf] extra is not installed")
  pytest.importorskip("torch", reason="the [hf] extra is not installed")
  logits, gradients = hf.compute()
  stored_logits, stored = hf.read()
  assert relative_error(logits, stored_logits) < 1e-6
  assert sorted(gradients) == sorted(stored)
  for name in stored:
    assert relative_error(gradients[name], stored[name]) < 1e-5, name
