# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's models at tiny random sizes: logits, gradients, kept in files.

  python tests/convert/families.py [NAME...]   rewrites hf/*.npz (needs [hf])

Weights and tokens follow from a seed and the rules' own shapes, so a file holds
only what transformers computed from them; where transformers is installed, a
test computes it again.
"""

import dataclasses
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import MLAConfig, ModelConfig, MoEConfig
from moejax.convert import dbrx, deepseek, hunyuan, jetmoe, llama
from moejax.convert.rules import Rule

FOLDER = Path(__file__).with_name("hf")
# All sizes differ, so that no transpose goes unnoticed.
L, D, N, K, H, E, X, F, V = 2, 24, 4, 2, 6, 7, 3, 20, 53
B, T, NEW = 2, 17, 16
SIZES = {
  "vocab_size": V, "hidden_size": D, "num_hidden_layers": L,
  "num_attention_heads": N, "num_key_value_heads": K,
  "max_position_embeddings": 64, "tie_word_embeddings": False,
  "eos_token_id": None, "bos_token_id": 2, "pad_token_id": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture, in transformers' words and in ours."""

  name: str
  model_class: str
  hf_config: dict[str, Any]
  config: ModelConfig
  rules: Callable[[ModelConfig], Iterable[Rule]]

  @property
  def file(self) -> Path:
    return FOLDER / f"{self.name}.npz"


def _config(router: str, moe: dict[str, Any] | None = None, **options):
  values = {
    "vocab_size": V, "d_model": D, "num_layers": L, "num_heads": N,
    "num_kv_heads": K, "head_dim": H, "dtype": "float32", "qk_norm": "none",
    "scan_layers": False,
  }  # fmt: skip
  sizes = {"num_experts": E, "d_expert": F} | (moe or {})
  moe_config = MoEConfig(router=router, **sizes)
  return ModelConfig(**(values | options), moe=moe_config)


PLAIN, RENORMALIZED = f"top_k(k={X})", f"top_k(k={X}, renormalize=True)"
FAMILIES = [
  Family(
    "olmoe", "OlmoeForCausalLM",
    SIZES | {
      "model_type": "olmoe", "intermediate_size": F, "num_experts": E,
      "num_experts_per_tok": X, "norm_topk_prob": False, "clip_qkv": 0.7,
      "rms_norm_eps": 1e-5,
    },
    _config(PLAIN, qk_norm="full", clip_qkv=0.7),
    llama.olmoe,
  ),
  Family(
    "mixtral", "MixtralForCausalLM",
    SIZES | {
      "model_type": "mixtral", "head_dim": H, "intermediate_size": F,
      "num_local_experts": E, "num_experts_per_tok": X, "rms_norm_eps": 1e-5,
      "sliding_window": None, "rope_theta": 1e6,
    },
    _config(RENORMALIZED, rope_theta=1e6),
    llama.mixtral,
  ),
  Family(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    SIZES | {
      "model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 8,
      "intermediate_size": 28, "moe_intermediate_size": F, "num_experts": E,
      "num_experts_per_tok": X, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
      "mlp_only_layers": [0], "decoder_sparse_step": 1,
    },
    _config(
      RENORMALIZED, qk_norm="head", head_dim=8, num_layers=3, d_mlp=28,
      prefix=("attention/mlp",), norm_eps=1e-6,
    ),
    llama.olmoe,
  ),
  Family(
    "flex_olmo", "FlexOlmoForCausalLM",
    SIZES | {
      "model_type": "flex_olmo", "intermediate_size": F, "num_experts": E,
      "num_experts_per_tok": X, "norm_topk_prob": False, "rms_norm_eps": 1e-6,
      "rope_theta": 5e5,
    },
    _config(
      PLAIN, qk_norm="full", norm_position="post", norm_eps=1e-6,
      rope_theta=5e5,
    ),
    llama.flex_olmo,
  ),
  Family(
    "jetmoe", "JetMoeForCausalLM",
    {
      "model_type": "jetmoe", "vocab_size": V, "hidden_size": D,
      "num_hidden_layers": L, "num_key_value_heads": K, "kv_channels": H,
      "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": X,
      "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
      "tie_word_embeddings": True, "pad_token_id": None, "eos_token_id": None,
    },
    _config(
      RENORMALIZED, {"output_bias": True}, num_heads=K * X,
      pattern=("moa/moe",), norm_eps=1e-6, final_norm_eps=1e-5,
      tie_embeddings=True,
    ),
    jetmoe.jetmoe,
  ),
  Family(
    "dbrx", "DbrxForCausalLM",
    {
      "model_type": "dbrx", "d_model": D, "n_heads": N, "n_layers": L,
      "max_seq_len": 64, "vocab_size": V, "tie_word_embeddings": False,
      "pad_token_id": None, "eos_token_id": None,
      "attn_config": {"kv_n_heads": K, "clip_qkv": 0.7, "rope_theta": 10000.0},
      "ffn_config": {
        "ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": X,
        "ffn_act_fn": {"name": "silu"},
      },
    },
    _config(RENORMALIZED, norm="layer", clip_qkv=0.7),
    dbrx.dbrx,
  ),
  Family(
    "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM",
    SIZES | {
      "model_type": "hunyuan_v1_moe", "head_dim": H, "intermediate_size": F,
      "num_experts": E, "moe_topk": X, "num_shared_expert": 1,
      "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
      "rope_parameters": {
        "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0,
        "rope_theta": 10000.0,
      },
    },
    _config(
      RENORMALIZED, {"num_shared_experts": 1}, qk_norm="head_after_rope",
      rope_scaling="ntk(alpha=1000.0)", tie_embeddings=True,
    ),
    hunyuan.hunyuan,
  ),
  Family(
    "deepseek_v3", "DeepseekV3ForCausalLM",
    SIZES | {
      "model_type": "deepseek_v3", "num_hidden_layers": 3,
      "num_key_value_heads": N, "q_lora_rank": 14, "kv_lora_rank": 10,
      "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5,
      "intermediate_size": 28, "moe_intermediate_size": F,
      "first_k_dense_replace": 1, "n_routed_experts": 12,
      "n_shared_experts": 2, "num_experts_per_tok": X, "n_group": 4,
      "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
      "rms_norm_eps": 1e-5, "rope_interleave": True,
      "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "beta_fast": 2.0,
        "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.0,
      },
    },
    _config(
      "group_limited(k=3, num_groups=4, topk_groups=2, scale=2.5, "
      "renormalize=True)",
      {"num_experts": 12, "num_shared_experts": 2}, num_layers=3,
      num_kv_heads=N, head_dim=14, d_mlp=28, prefix=("mla/mlp",),
      pattern=("mla/moe",), norm_eps=1e-5,
      mla=MLAConfig(q_rank=14, kv_rank=10, nope_dim=6, rope_dim=8, v_dim=5),
      rope_scaling="yarn(factor=4.0, original=16.0, beta_fast=2.0, "
      "beta_slow=0.5, mscale=0.7, mscale_all_dim=1.0)",
    ),
    deepseek.deepseek_v3,
  ),
]  # fmt: skip


def tensors(family: Family) -> dict[str, np.ndarray]:
  """Weights by hub name, float32; norms are not 1, biases not 0."""
  found = {}
  for rule in family.rules(family.config):
    for name, shape in zip(rule.names, rule.shapes):
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      gain = len(shape) == 1 and not name.endswith("bias")
      found[name] = rng.normal(gain, 0.15, shape).astype(np.float32)
  return found


def inputs() -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, T], cotangent of the logits [B, T, V])."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, V, (B, T))
  return tokens, rng.standard_normal((B, T, V)).astype(np.float32)


def load(family: Family, weights: dict[str, np.ndarray], dtype: Any) -> Any:
  """transformers' model of these weights, computing in torch's `dtype`."""
  import transformers
  from safetensors.numpy import save_file

  model_class = getattr(transformers, family.model_class)
  with tempfile.TemporaryDirectory() as folder:
    config = {"architectures": [family.model_class], **family.hf_config}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    return model_class.from_pretrained(
      folder, dtype=dtype, attn_implementation="eager",
      experts_implementation="eager",
    ).eval()  # fmt: skip


def loss_and_gradients(family: Family, weight: float):
  """transformers' language-model loss, and gradients by hub name.

  With `weight` times its auxiliary loss, where it has one.
  """
  import torch

  model = load(family, tensors(family), torch.float32)
  tokens = torch.tensor(inputs()[0])
  loss = model(tokens, labels=tokens).loss
  again = model(tokens, output_router_logits=True)
  if getattr(again, "aux_loss", None) is not None:
    loss = loss + weight * again.aux_loss
  loss.backward()
  return loss.item(), _stored_gradients(model)


def _stored_gradients(model: Any) -> dict[str, np.ndarray]:
  """By the names that the hub's files have, which are not the module's."""
  import torch
  from safetensors.numpy import load_file

  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.grad)
    for buffer in model.buffers():  # DeepSeek's biases have no gradient
      buffer.zero_()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return load_file(Path(folder) / "model.safetensors")


def compute(family: Family) -> dict[str, np.ndarray]:
  """What transformers makes of it: logits, greedy tokens, `grad/NAME`.

  And `aux_loss`, where it has one.
  """
  import torch

  model = load(family, tensors(family), torch.float32)
  tokens, cotangent = inputs()
  logits = model(torch.tensor(tokens)).logits
  (logits * torch.tensor(cotangent)).sum().backward()
  greedy = model.generate(
    torch.tensor(tokens), attention_mask=torch.ones(B, T, dtype=torch.long),
    do_sample=False, max_new_tokens=NEW, pad_token_id=0, use_cache=True,
  )  # fmt: skip
  out = {"logits": logits.detach().numpy(), "greedy": greedy[:, T:].numpy()}
  with torch.no_grad():
    again = model(torch.tensor(tokens), output_router_logits=True)
    if getattr(again, "aux_loss", None) is not None:  # unweighted
      out["aux_loss"] = again.aux_loss.numpy()
  stored = _stored_gradients(model)
  return out | {f"grad/{name}": value for name, value in stored.items()}


if __name__ == "__main__":
  names = sys.argv[1:] or [family.name for family in FAMILIES]
  for family in (f for f in FAMILIES if f.name in names):
    np.savez_compressed(family.file, **compute(family))
    print(f"{family.file.name}: {family.file.stat().st_size:,} bytes")
