# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's OLMoE at a tiny size: logits and gradients, kept in a file.

  python tests/models/hf_olmoe.py      rewrites hf_olmoe.npz (needs [hf])

Weights and tokens follow from a seed, so the file holds only what transformers
computed from them; `test_hf_olmoe.py` checks the file itself wherever
transformers is installed.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("hf_olmoe.npz")
# All sizes differ, so that no transpose goes unnoticed.
L, D, N, K, H, E, X, F, V = 2, 24, 4, 2, 6, 7, 3, 20, 53
B, T = 2, 17
LAYER = {
  "input_layernorm.weight": (D,),
  "post_attention_layernorm.weight": (D,),
  "self_attn.q_proj.weight": (N * H, D),
  "self_attn.k_proj.weight": (K * H, D),
  "self_attn.v_proj.weight": (K * H, D),
  "self_attn.o_proj.weight": (D, N * H),
  "self_attn.q_norm.weight": (N * H,),
  "self_attn.k_norm.weight": (K * H,),
  "mlp.gate.weight": (E, D),
  "mlp.experts.gate_up_proj": (E, 2 * F, D),
  "mlp.experts.down_proj": (E, D, F),
}


def weights():
  """Tensors by their hub names, float32, from a seed."""
  shapes = {
    "model.embed_tokens.weight": (V, D),
    "model.norm.weight": (D,),
    "lm_head.weight": (V, D),
  }
  for i in range(L):
    shapes |= {f"model.layers.{i}.{k}": v for k, v in LAYER.items()}
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(1 if len(shape) == 1 else 0, 0.15, shape).astype(
      np.float32
    )
    for name, shape in shapes.items()
  }


def inputs():
  """(tokens [B, T], cotangent of the logits [B, T, V])."""
  rng = np.random.default_rng(1)
  return (
    rng.integers(0, V, (B, T)),
    rng.standard_normal((B, T, V)).astype(np.float32),
  )


def compute():
  """(logits, gradients by name) as transformers computes them."""
  import torch
  import transformers

  config = transformers.OlmoeConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
    num_attention_heads=N, num_key_value_heads=K, num_experts=E,
    num_experts_per_tok=X, norm_topk_prob=False, rms_norm_eps=1e-5,
    max_position_embeddings=64, pad_token_id=None, eos_token_id=1,
    tie_word_embeddings=False, attn_implementation="eager",
  )  # fmt: skip
  model = transformers.OlmoeForCausalLM(config).float().eval()
  state = {k: torch.tensor(v) for k, v in weights().items()}
  model.load_state_dict(state, strict=True)
  tokens, cotangent = inputs()
  logits = model(torch.tensor(tokens)).logits
  (logits * torch.tensor(cotangent)).sum().backward()
  gradients = {k: p.grad.numpy() for k, p in model.named_parameters()}
  return logits.detach().numpy(), gradients


def read():
  """(logits, gradients by name) from the file."""
  with np.load(FILE) as file:
    stored = dict(file)
  return stored.pop("logits"), stored


if __name__ == "__main__":
  logits, gradients = compute()
  np.savez_compressed(FILE, logits=logits, **gradients)
  print(f"{FILE}: {FILE.stat().st_size:,} bytes")
