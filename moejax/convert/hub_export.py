# SPDX-License-Identifier: Apache-2.0
"""A `ModelConfig` as each family's config.json: the readers, inverted.

A writer says what its family can; whether that is this model is settled by
reading the result back.
"""

import dataclasses
from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.spec import Spec

# The routers whose choice in evaluation is plain top-k.
_TRAINED_AS = {"recycle": "top_k(k=1)"}


def olmoe(config: ModelConfig) -> dict[str, Any]:
  return _llama(config) | {
    "clip_qkv": config.clip_qkv or None,
    "intermediate_size": config.moe.d_expert,
    "num_experts": config.moe.num_experts,
    "num_experts_per_tok": config.moe.experts_per_token,
    "norm_topk_prob": renormalizes(config),
  }


def flex_olmo(config: ModelConfig) -> dict[str, Any]:
  return olmoe(config)


def mixtral(config: ModelConfig) -> dict[str, Any]:
  return _llama(config) | {
    "head_dim": config.head_dim,
    "intermediate_size": config.moe.d_expert,
    "num_local_experts": config.moe.num_experts,
    "num_experts_per_tok": config.moe.experts_per_token,
    "sliding_window": None,
  }


def qwen3_moe(config: ModelConfig) -> dict[str, Any]:
  dense = [i for i, layer in enumerate(config.layers) if layer.ffn == "mlp"]
  return _llama(config) | {
    "head_dim": config.head_dim,
    "intermediate_size": config.d_mlp,
    "moe_intermediate_size": config.moe.d_expert,
    "num_experts": config.moe.num_experts,
    "num_experts_per_tok": config.moe.experts_per_token,
    "norm_topk_prob": renormalizes(config),
    "decoder_sparse_step": 1,
    "mlp_only_layers": dense,
    "use_sliding_window": False,
    "sliding_window": None,
  }


def jetmoe(config: ModelConfig) -> dict[str, Any]:
  return _rope(config) | {
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "kv_channels": config.head_dim,
    "intermediate_size": config.moe.d_expert,
    "num_local_experts": config.moe.num_experts,
    "num_experts_per_tok": config.moe.experts_per_token,
    "activation_function": "silu",
    "rms_norm_eps": config.final_norm_eps or config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def dbrx(config: ModelConfig) -> dict[str, Any]:
  rope = _rope(config)
  return rope | {
    "vocab_size": config.vocab_size,
    "d_model": config.d_model,
    "n_layers": config.num_layers,
    "n_heads": config.num_heads,
    "tie_word_embeddings": config.tie_embeddings,
    "attn_config": {
      "kv_n_heads": config.num_kv_heads,
      "clip_qkv": config.clip_qkv or None,
      # Published here; transformers reads the top level.
      "rope_theta": rope["rope_theta"],
    },
    "ffn_config": {
      "ffn_act_fn": {"name": "silu"},
      "ffn_hidden_size": config.moe.d_expert,
      "moe_num_experts": config.moe.num_experts,
      "moe_top_k": config.moe.experts_per_token,
      "moe_normalize_expert_weights": 1.0,
    },
  }


def hunyuan_v1_moe(config: ModelConfig) -> dict[str, Any]:
  return _llama(config) | {
    "head_dim": config.head_dim,
    "intermediate_size": config.moe.d_expert,
    "num_experts": config.moe.num_experts,
    "moe_topk": config.moe.experts_per_token,
    "num_shared_expert": config.moe.num_shared_experts,
    "use_qk_norm": True,
  }


def hunyuan_large(config: ModelConfig) -> dict[str, Any]:
  shares = [not layer.has_kv for layer in config.layers]
  factor = shares.index(False, 1) if False in shares[1:] else len(shares)
  return hunyuan_v1_moe(config) | {
    "attention_head_dim": config.head_dim,
    "use_cla": any(shares),
    "cla_share_factor": factor if any(shares) else 2,
    "use_mixed_mlp_moe": config.moe.num_shared_experts > 0,
    "norm_type": "rms",
  }


def renormalizes(config: ModelConfig) -> bool:
  """Whether the router is `top_k` with `renormalize=True`."""
  kwargs = config.moe.router_spec.kwargs
  return "renormalize" in kwargs and bool(kwargs["renormalize"])


def architecture(config: ModelConfig) -> ModelConfig:
  """The config without what another framework does not know of.

  How it is computed, initialised and regularised; unused sizes; spellings.
  """
  plain, moe = ModelConfig(), MoEConfig()
  ffns = {layer.ffn for layer in config.layers}
  routed = any(layer.num_routers for layer in config.layers)
  return dataclasses.replace(
    config,
    prefix=tuple(f"{x.mixer}/{x.ffn}" for x in config.layers),
    pattern=plain.pattern,
    num_heads=config.num_heads,
    d_mlp=config.d_mlp if "mlp" in ffns else plain.d_mlp,
    final_norm_eps=config.final_norm_eps or config.norm_eps,
    scan_layers=False,
    moe=dataclasses.replace(
      config.moe,
      router=_plain_router(config.moe) if routed else moe.router,
      dispatch=moe.dispatch,
      matmul=moe.matmul,
    ),
    **{
      name: getattr(plain, name)
      for name in ("init_std", "dtype", "attention", "remat")
    },
  )


def _plain_router(moe: MoEConfig) -> str:
  """The router as it is in evaluation, options at their defaults left out."""
  spec = moe.router_spec
  if spec.name in _TRAINED_AS:
    return _TRAINED_AS[spec.name]
  defaults = {"renormalize": False, "score": "softmax"}
  kwargs = {
    name: value
    for name, value in sorted(spec.kwargs.items())
    if name != "jitter" and (name, value) not in defaults.items()
  }
  return str(Spec(spec.name, kwargs))


def _rope(config: ModelConfig) -> dict[str, Any]:
  """Both of the hub's spellings, of version 4 and of version 5."""
  spec = config.rope_scaling_spec
  scaling = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear"} | spec.kwargs,
    "ntk": {"rope_type": "dynamic", "factor": 1.0} | spec.kwargs,
  }[spec.name]
  return {
    "rope_theta": config.rope_theta,
    "rope_parameters": scaling | {"rope_theta": config.rope_theta},
  }


def _llama(config: ModelConfig) -> dict[str, Any]:
  return _rope(config) | {
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": config.tie_embeddings,
  }
