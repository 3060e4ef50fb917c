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
_DEFAULTS = {
  "group_limited": {
    "num_groups": 1, "topk_groups": 1, "scale": 1.0, "renormalize": True,
  },
  "top_k": {"renormalize": False, "score": "softmax"},
}  # fmt: skip
_OF_TRAINING = ("jitter", "bias_rate")


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


def deepseek_v3(config: ModelConfig) -> dict[str, Any]:
  mla, router = config.mla, _options(config.moe)
  dense = [layer.ffn == "mlp" for layer in config.layers]
  return _llama(config) | {
    "q_lora_rank": mla.q_rank or None,
    "kv_lora_rank": mla.kv_rank,
    "qk_nope_head_dim": mla.nope_dim,
    "qk_rope_head_dim": mla.rope_dim,
    "v_head_dim": mla.v_dim,
    "intermediate_size": config.d_mlp,
    "moe_intermediate_size": config.moe.d_expert,
    "first_k_dense_replace": dense.index(False) if False in dense else 0,
    "n_routed_experts": config.moe.num_experts,
    "n_shared_experts": config.moe.num_shared_experts,
    "num_experts_per_tok": config.moe.experts_per_token,
    "n_group": router["num_groups"],
    "topk_group": router["topk_groups"],
    "routed_scaling_factor": router["scale"],
    "norm_topk_prob": router["renormalize"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
  }


def renormalizes(config: ModelConfig) -> bool:
  return bool(_options(config.moe)["renormalize"])


def _options(moe: MoEConfig) -> dict[str, Any]:
  """The router's options; those of all families' routers have a value."""
  spec = moe.router_spec
  plain = {k: v for known in _DEFAULTS.values() for k, v in known.items()}
  mine = _DEFAULTS[spec.name] if spec.name in _DEFAULTS else {}
  return plain | mine | spec.kwargs


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
    mla=config.mla if config.uses_mla else plain.mla,
    d_mlp=config.d_mlp if "mlp" in ffns else plain.d_mlp,
    rope_scaling=str(_floats(config.rope_scaling_spec)),
    final_norm_eps=config.final_norm_eps or config.norm_eps,
    scan_layers=False,
    moe=dataclasses.replace(
      config.moe if routed else moe,
      router=_plain_router(config.moe) if routed else moe.router,
      dispatch=moe.dispatch,
      matmul=moe.matmul,
    ),
    **{
      name: getattr(plain, name)
      for name in ("init_std", "init_cut", "dtype", "attention", "remat")
    },
  )


def _floats(spec: Spec) -> Spec:
  return Spec(spec.name, {k: float(v) for k, v in sorted(spec.kwargs.items())})


def _plain_router(moe: MoEConfig) -> str:
  """The router as it is in evaluation, options at their defaults left out."""
  spec = moe.router_spec
  if spec.name in _TRAINED_AS:
    return _TRAINED_AS[spec.name]
  defaults = _DEFAULTS[spec.name] if spec.name in _DEFAULTS else {}
  kwargs = {
    name: value
    for name, value in sorted(spec.kwargs.items())
    if name not in _OF_TRAINING and (name, value) not in defaults.items()
  }
  return str(Spec(spec.name, kwargs))


def _rope(config: ModelConfig) -> dict[str, Any]:
  """Both of the hub's spellings, of version 4 and of version 5."""
  spec = config.rope_scaling_spec
  scaling = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear"},
    "ntk": {"rope_type": "dynamic", "factor": 1.0},
    "yarn": {"rope_type": "yarn"},
  }[spec.name] | spec.kwargs
  if "original" in scaling:
    scaling["original_max_position_embeddings"] = int(scaling.pop("original"))
  # transformers warns where the stretched length is not this product.
  longest = {}
  if spec.name == "yarn":
    length = int(spec.kwargs["factor"] * spec.kwargs["original"])
    longest = {"max_position_embeddings": length}
  return longest | {
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
