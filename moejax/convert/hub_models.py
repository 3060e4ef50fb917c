# SPDX-License-Identifier: Apache-2.0
"""Each family's config.json as options of `ModelConfig`."""

from typing import Any

from moejax.convert.hub_config import (
  HubConfig,
  refuse_constant_weights,
  rope,
  stack,
  top_k,
)
from moejax.spec import Spec


def olmoe(hub: HubConfig) -> dict[str, Any]:
  k = hub.take("num_experts_per_tok")
  return _llama(hub, 1e-5) | {
    "qk_norm": "full",
    "clip_qkv": float(hub.take("clip_qkv", default=0.0)),
    "moe": {
      "num_experts": hub.take("num_experts"),
      "d_expert": hub.take("intermediate_size"),
      "router": top_k(k, hub.take("norm_topk_prob", default=False)),
    },
  }


def flex_olmo(hub: HubConfig) -> dict[str, Any]:
  return olmoe(hub) | rope(hub, 5e5) | {
    "norm_position": "post",
    "norm_eps": float(hub.take("rms_norm_eps", default=1e-6)),
  }  # fmt: skip


def mixtral(hub: HubConfig) -> dict[str, Any]:
  hub.expect("sliding_window", None)
  return _llama(hub, 1e-5) | rope(hub, 1e6) | {
    "moe": {
      "num_experts": hub.take("num_local_experts"),
      "d_expert": hub.take("intermediate_size"),
      "router": top_k(hub.take("num_experts_per_tok"), True),
    },
  }  # fmt: skip


def qwen3_moe(hub: HubConfig) -> dict[str, Any]:
  hub.expect("use_sliding_window", False)
  hub.take("sliding_window", "max_window_layers", default=None)
  dense = set(hub.take("mlp_only_layers", default=[]))
  every = hub.take("decoder_sparse_step", default=1)
  kinds = [
    "attention/mlp" if i in dense or (i + 1) % every else "attention/moe"
    for i in range(hub.take("num_hidden_layers"))
  ]
  k = hub.take("num_experts_per_tok")
  return _llama(hub, 1e-6) | stack(kinds) | {
    "qk_norm": "head",
    "d_mlp": hub.take("intermediate_size"),
    "moe": {
      "num_experts": hub.take("num_experts", "num_local_experts"),
      "d_expert": hub.take("moe_intermediate_size"),
      "router": top_k(k, hub.take("norm_topk_prob", default=False)),
    },
  }  # fmt: skip


def jetmoe(hub: HubConfig) -> dict[str, Any]:
  hub.expect("activation_function", "silu")
  hub.expect("glu", True)
  hub.expect("bias", True)
  k = hub.take("num_experts_per_tok", "moe_top_k")
  kv_heads = hub.take("num_key_value_heads", "n_head")
  hub.take("num_attention_heads", default=None)  # k times the other
  return rope(hub) | {
    "vocab_size": hub.take("vocab_size"),
    "d_model": hub.take("hidden_size", "n_embd"),
    "num_layers": hub.take("num_hidden_layers", "num_layers", "n_layer"),
    "pattern": ("moa/moe",),
    "num_heads": k * kv_heads,
    "num_kv_heads": kv_heads,
    "head_dim": hub.take("kv_channels"),
    "qk_norm": "none",
    "norm_eps": 1e-6,  # the class never hands the config's to its blocks
    "final_norm_eps": float(
      hub.take("rms_norm_eps", "layer_norm_epsilon", default=1e-6)
    ),
    "tie_embeddings": hub.take("tie_word_embeddings", default=True),
    "moe": {
      "num_experts": hub.take("num_local_experts", "moe_num_experts"),
      "d_expert": hub.take("intermediate_size", "ffn_hidden_size"),
      "router": top_k(k, True),
      "output_bias": True,
    },
  }


def dbrx(hub: HubConfig) -> dict[str, Any]:
  hub.expect("tie_word_embeddings", False)
  attention, ffn = hub.section("attn_config"), hub.section("ffn_config")
  ffn.section("ffn_act_fn").expect("name", "silu")
  ffn.expect("moe_normalize_expert_weights", 1, 1.0)
  theta = attention.take("rope_theta", default=None)
  heads, width = hub.take("n_heads"), hub.take("d_model")
  values = rope(hub)
  if theta is not None:  # published there; the top level is only a default
    values["rope_theta"] = float(theta)
  return values | {
    "vocab_size": hub.take("vocab_size"),
    "d_model": width,
    "num_layers": hub.take("n_layers"),
    "num_heads": heads,
    "num_kv_heads": attention.take("kv_n_heads"),
    "head_dim": width // heads,
    "qk_norm": "none",
    "clip_qkv": float(attention.take("clip_qkv", default=0.0)),
    "norm": "layer",
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "moe": {
      "num_experts": ffn.take("moe_num_experts"),
      "d_expert": ffn.take("ffn_hidden_size"),
      "router": top_k(ffn.take("moe_top_k"), True),
    },
  }


def hunyuan_v1_moe(hub: HubConfig) -> dict[str, Any]:
  """The smaller sibling: renormalises at any k, shares no keys."""
  return _hunyuan(hub, renormalize=True)


def hunyuan_large(hub: HubConfig) -> dict[str, Any]:
  """Keys and values shared over `cla_share_factor` layers; top-1 as it is."""
  values = _hunyuan(hub, renormalize=False)
  factor = hub.take("cla_share_factor", default=2)
  if not hub.take("use_cla", default=False):
    return values
  kinds = [
    "attention/moe" if i % factor == 0 else "shared_kv/moe"
    for i in range(values["num_layers"])
  ]
  return values | stack(kinds)


def deepseek_v3(hub: HubConfig) -> dict[str, Any]:
  for name, value in (
    ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"),
    ("moe_layer_freq", 1), ("rope_interleave", True),
  ):  # fmt: skip
    hub.expect(name, value)
  # Of training, of how it is split, or said elsewhere.
  for name in (
    "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers",
    "head_dim", "qk_head_dim",
  ):  # fmt: skip
    hub.take(name, default=None)
  dense, L = hub.take("first_k_dense_replace"), hub.take("num_hidden_layers")
  kinds = ["mla/mlp"] * min(dense, L) + ["mla/moe"] * max(L - dense, 0)
  router = {
    "k": hub.take("num_experts_per_tok"),
    "num_groups": hub.take("n_group"),
    "topk_groups": hub.take("topk_group"),
    "scale": float(hub.take("routed_scaling_factor")),
    "renormalize": hub.take("norm_topk_prob"),
  }
  refuse_constant_weights(router["k"], router["renormalize"])
  nope, rotated = hub.take("qk_nope_head_dim"), hub.take("qk_rope_head_dim")
  values = _llama(hub, 1e-6)
  return values | stack(kinds) | {
    "num_kv_heads": values["num_heads"],
    "head_dim": nope + rotated,
    "mla": {
      "q_rank": hub.take("q_lora_rank", default=0),
      "kv_rank": hub.take("kv_lora_rank"),
      "nope_dim": nope,
      "rope_dim": rotated,
      "v_dim": hub.take("v_head_dim"),
    },
    "d_mlp": hub.take("intermediate_size"),
    "moe": {
      "num_experts": hub.take("n_routed_experts", "num_local_experts"),
      "d_expert": hub.take("moe_intermediate_size"),
      "num_shared_experts": hub.take("n_shared_experts"),
      "router": str(Spec("group_limited", router)),
    },
  }  # fmt: skip


def _hunyuan(hub: HubConfig, renormalize: bool) -> dict[str, Any]:
  k = _one(hub, "moe_topk")
  shared = _one(hub, "num_shared_expert")
  if not hub.take("use_mixed_mlp_moe", default=True):
    shared = 0
  # Of training, and not acted on by the published code either.
  for name in ("moe_drop_tokens", "moe_random_routing_dropped_token"):
    hub.take(name, "capacity_factor", default=None)
  hub.expect("use_qk_norm", True)
  hub.expect("norm_type", "rms", "hf_rms")
  return _llama(hub, 1e-5) | {
    "qk_norm": "head_after_rope",
    "moe": {
      "num_experts": _one(hub, "num_experts"),
      "d_expert": hub.take("intermediate_size"),
      "router": top_k(k, renormalize),
      "num_shared_experts": shared,
    },
  }


def _one(hub: HubConfig, name: str) -> int:
  """A number, or a list that says the same of every layer."""
  value = hub.take(name)
  if not isinstance(value, list):
    return value
  hub.expect(name, [value[0]] * len(value))
  return value[0]


def _llama(hub: HubConfig, eps: float) -> dict[str, Any]:
  """What all Llama-like families spell alike."""
  hub.expect("hidden_act", "silu")
  for name in ("attention_bias", "mlp_bias"):
    hub.expect(name, False)
  width, heads = hub.take("hidden_size"), hub.take("num_attention_heads")
  return rope(hub) | {
    "vocab_size": hub.take("vocab_size"),
    "d_model": width,
    "num_layers": hub.take("num_hidden_layers"),
    "num_heads": heads,
    "num_kv_heads": hub.take("num_key_value_heads", default=heads),
    "head_dim": hub.take(
      "head_dim", "attention_head_dim", default=width // heads
    ),
    "qk_norm": "none",
    "norm_eps": float(hub.take("rms_norm_eps", default=eps)),
    "tie_embeddings": hub.take("tie_word_embeddings", default=False),
  }
