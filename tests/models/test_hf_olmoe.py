# SPDX-License-Identifier: Apache-2.0
"""Logits and gradients against Hugging Face's OLMoE at a tiny random size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models import Rows, build, init_params

torch = pytest.importorskip("torch", reason="the [hf] extra is not installed")
transformers = pytest.importorskip(
  "transformers", reason="the [hf] extra is not installed"
)
pytestmark = pytest.mark.hf

# All sizes differ, so that no transpose goes unnoticed.
L, D, N, K, H, E, X, F, V = 3, 48, 4, 2, 12, 7, 3, 40, 97
CONFIG = ModelConfig(
  vocab_size=V, d_model=D, num_layers=L, num_heads=N, num_kv_heads=K,
  head_dim=H, dtype="float32",
  moe=MoEConfig(num_experts=E, d_expert=F, router=f"top_k(k={X})"),
)  # fmt: skip


@pytest.fixture(scope="module")
def hf_model():
  config = transformers.OlmoeConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
    num_attention_heads=N, num_key_value_heads=K, num_experts=E,
    num_experts_per_tok=X, norm_topk_prob=False, rms_norm_eps=1e-5,
    max_position_embeddings=64, pad_token_id=None, eos_token_id=1,
    tie_word_embeddings=False, attn_implementation="eager",
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.OlmoeForCausalLM(config).float().eval()
  for p in model.parameters():
    p.data.normal_(0, 0.08)
  return model


def to_moejax(tensors):
  """Our tree from a dict of HF tensors; linear, so it maps gradients too."""
  t = {name: value.detach().numpy() for name, value in tensors.items()}

  def stack(name, f):
    rows = [f(t[f"model.layers.{i}.{name}"]) for i in range(L)]
    return jnp.asarray(np.stack(rows))

  gain = lambda name: stack(name, lambda w: w)
  heads = lambda name, n: stack(name, lambda w: w.T.reshape(D, n, H))
  gate_up = "mlp.experts.gate_up_proj"
  block = {
    "attention_norm": {"scale": gain("input_layernorm.weight")},
    "ffn_norm": {"scale": gain("post_attention_layernorm.weight")},
    "attention": {
      "w_q_DNH": heads("self_attn.q_proj.weight", N),
      "w_k_DKH": heads("self_attn.k_proj.weight", K),
      "w_v_DKH": heads("self_attn.v_proj.weight", K),
      "w_o_NHD": stack(
        "self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D)
      ),
      "q_norm": gain("self_attn.q_norm.weight"),
      "k_norm": gain("self_attn.k_norm.weight"),
    },
    "moe": {
      "w_router_DE": stack("mlp.gate.weight", np.transpose),
      "w_gate_EDF": stack(gate_up, lambda w: w[:, :F].swapaxes(1, 2)),
      "w_up_EDF": stack(gate_up, lambda w: w[:, F:].swapaxes(1, 2)),
      "w_down_EFD": stack(
        "mlp.experts.down_proj", lambda w: w.swapaxes(1, 2)
      ),
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


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
def test_logits_and_gradients_equal_hugging_face(hf_model, dispatch):
  moe = dataclasses.replace(CONFIG.moe, dispatch=dispatch)
  model = build(dataclasses.replace(CONFIG, moe=moe))
  params = to_moejax(hf_model.state_dict())
  tokens = np.random.default_rng(0).integers(0, V, (2, 17))
  weights = np.random.default_rng(1).standard_normal((2, 17, V), np.float32)
  rows = Rows(
    jnp.ones((2, 17), jnp.int32), jnp.broadcast_to(jnp.arange(17), (2, 17))
  )

  def logits(params):
    out = model.apply({"params": params}, jnp.asarray(tokens), rows)
    return model.apply({"params": params}, out.hidden_BTD, method="logits")

  def weighted(params):
    return (logits(params) * weights).sum()

  hf_logits = hf_model(torch.tensor(tokens)).logits
  hf_model.zero_grad()
  (hf_logits * torch.tensor(weights)).sum().backward()
  hf_grads = to_moejax({n: p.grad for n, p in hf_model.named_parameters()})

  assert relative_error(jax.jit(logits)(params), hf_logits.detach()) < 2e-6
  grads = jax.jit(jax.grad(weighted))(params)
  assert jax.tree.structure(grads) == jax.tree.structure(hf_grads)
  errors = jax.tree.map(relative_error, grads, hf_grads)
  assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_tree_is_the_models_own():
  params = jax.eval_shape(
    lambda: init_params(build(CONFIG), jax.random.key(0))
  )
  model = transformers.OlmoeForCausalLM(
    transformers.OlmoeConfig(
      vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
      num_attention_heads=N, num_key_value_heads=K, num_experts=E,
      num_experts_per_tok=X, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
  )
  mapped = to_moejax(model.state_dict())
  assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(jnp.shape, params)
