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
from moejax.errors import DataError
from moejax.spec import Spec

MAX_LAYERS = 1000  # more is a damaged file


def olmoe(hub: HubConfig) -> dict[str, Any]:
  k = hub.size("num_experts_per_tok")
  return _llama(hub, 1e-5) | {
    "qk_norm": "full",
    "clip_qkv": hub.number("clip_qkv", default=0.0),
    "moe": {
      "num_experts": hub.size("num_experts"),
      "d_expert": hub.size("intermediate_size"),
      "router": top_k(k, hub.flag("norm_topk_prob", default=False)),
    },
  }


def flex_olmo(hub: HubConfig) -> dict[str, Any]:
  return olmoe(hub) | rope(hub, 5e5) | {
    "norm_position": "post",
    "norm_eps": hub.number("rms_norm_eps", default=1e-6),
  }  # fmt: skip


def mixtral(hub: HubConfig) -> dict[str, Any]:
  hub.expect("sliding_window", None)
  return _llama(hub, 1e-5) | rope(hub, 1e6) | {
    "moe": {
      "num_experts": hub.size("num_local_experts"),
      "d_expert": hub.size("intermediate_size"),
      "router": top_k(hub.size("num_experts_per_tok"), True),
    },
  }  # fmt: skip


def qwen3_moe(hub: HubConfig) -> dict[str, Any]:
  hub.expect("use_sliding_window", False)
  hub.ignore("sliding_window", "max_window_layers")
  dense = hub.take("mlp_only_layers", default=[])
  if not isinstance(dense, list):
    raise DataError(f"{hub.where}: mlp_only_layers={dense!r} is not a list")
  every = hub.size("decoder_sparse_step", default=1)
  kinds = [
    "attention/mlp" if i in dense or (i + 1) % every else "attention/moe"
    for i in range(hub.size("num_hidden_layers", most=MAX_LAYERS))
  ]
  k = hub.size("num_experts_per_tok")
  return _llama(hub, 1e-6) | stack(kinds) | {
    "qk_norm": "head",
    "d_mlp": hub.size("intermediate_size"),
    "moe": {
      "num_experts": hub.size("num_experts", "num_local_experts"),
      "d_expert": hub.size("moe_intermediate_size"),
      "router": top_k(k, hub.flag("norm_topk_prob", default=False)),
    },
  }  # fmt: skip


def jetmoe(hub: HubConfig) -> dict[str, Any]:
  hub.expect("activation_function", "silu")
  hub.expect("glu", True)
  hub.expect("bias", True)
  k = hub.size("num_experts_per_tok", "moe_top_k")
  kv_heads = hub.size("num_key_value_heads", "n_head")
  hub.ignore("num_attention_heads")  # k times the other
  return rope(hub) | {
    "vocab_size": hub.size("vocab_size"),
    "d_model": hub.size("hidden_size", "n_embd"),
    "num_layers": hub.size(
      "num_hidden_layers", "num_layers", "n_layer", most=MAX_LAYERS
    ),
    "pattern": ("moa/moe",),
    "num_heads": k * kv_heads,
    "num_kv_heads": kv_heads,
    "head_dim": hub.size("kv_channels"),
    "qk_norm": "none",
    "norm_eps": 1e-6,  # the class never hands the config's to its blocks
    "final_norm_eps": hub.number(
      "rms_norm_eps", "layer_norm_epsilon", default=1e-6
    ),
    "tie_embeddings": hub.flag("tie_word_embeddings", default=True),
    "moe": {
      "num_experts": hub.size("num_local_experts", "moe_num_experts"),
      "d_expert": hub.size("intermediate_size", "ffn_hidden_size"),
      "router": top_k(k, True),
      "output_bias": True,
    },
  }


def dbrx(hub: HubConfig) -> dict[str, Any]:
  hub.expect("tie_word_embeddings", False)
  attention, ffn = hub.section("attn_config"), hub.section("ffn_config")
  ffn.section("ffn_act_fn").expect("name", "silu")
  ffn.expect("moe_normalize_expert_weights", 1, 1.0)
  heads, width = hub.size("n_heads"), hub.size("d_model")
  values = rope(hub)
  # Published there; the top level is only a default.
  theta = attention.number("rope_theta", default=values["rope_theta"])
  return values | {
    "rope_theta": theta,
    "vocab_size": hub.size("vocab_size"),
    "d_model": width,
    "num_layers": hub.size("n_layers", most=MAX_LAYERS),
    "num_heads": heads,
    "num_kv_heads": attention.size("kv_n_heads"),
    "head_dim": width // heads,
    "qk_norm": "none",
    "clip_qkv": attention.number("clip_qkv", default=0.0),
    "norm": "layer",
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "moe": {
      "num_experts": ffn.size("moe_num_experts"),
      "d_expert": ffn.size("ffn_hidden_size"),
      "router": top_k(ffn.size("moe_top_k"), True),
    },
  }


def hunyuan_v1_moe(hub: HubConfig) -> dict[str, Any]:
  """The smaller sibling: renormalises at any k, shares no keys."""
  return _hunyuan(hub, renormalize=True)


def hunyuan_large(hub: HubConfig) -> dict[str, Any]:
  """Keys and values shared over `cla_share_factor` layers.

  Its code renormalises the weights of two experts and more, and leaves that of
  the one it was published with.
  """
  values = _hunyuan(hub, renormalize=_one(hub, "moe_topk") > 1)
  factor = hub.size("cla_share_factor", default=2)
  if not hub.flag("use_cla", default=False):
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
  hub.ignore(
    "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers",
    "head_dim", "qk_head_dim",
  )  # fmt: skip
  dense, L = (
    hub.size("first_k_dense_replace", least=0),
    hub.size("num_hidden_layers", most=MAX_LAYERS),
  )
  kinds = ["mla/mlp"] * min(dense, L) + ["mla/moe"] * max(L - dense, 0)
  router = {
    "k": hub.size("num_experts_per_tok"),
    "num_groups": hub.size("n_group"),
    "topk_groups": hub.size("topk_group"),
    "scale": hub.number("routed_scaling_factor"),
    "renormalize": hub.flag("norm_topk_prob"),
  }
  refuse_constant_weights(router["k"], router["renormalize"])
  nope, rotated = hub.size("qk_nope_head_dim"), hub.size("qk_rope_head_dim")
  values = _llama(hub, 1e-6)
  return values | stack(kinds) | {
    "num_kv_heads": values["num_heads"],
    "head_dim": nope + rotated,
    "mla": {
      "q_rank": hub.size("q_lora_rank", default=0, least=0),
      "kv_rank": hub.size("kv_lora_rank"),
      "nope_dim": nope,
      "rope_dim": rotated,
      "v_dim": hub.size("v_head_dim"),
    },
    "d_mlp": hub.size("intermediate_size"),
    "moe": {
      "num_experts": hub.size("n_routed_experts", "num_local_experts"),
      "d_expert": hub.size("moe_intermediate_size"),
      "num_shared_experts": hub.size("n_shared_experts", least=0),
      "router": str(Spec("group_limited", router)),
    },
  }  # fmt: skip


def _hunyuan(hub: HubConfig, renormalize: bool) -> dict[str, Any]:
  k = _one(hub, "moe_topk")
  shared = _one(hub, "num_shared_expert", least=0)
  if not hub.flag("use_mixed_mlp_moe", default=True):
    shared = 0
  # Of training, and not acted on by the published code either.
  hub.ignore(
    "moe_drop_tokens", "moe_random_routing_dropped_token", "capacity_factor"
  )
  hub.expect("use_qk_norm", True)
  hub.expect("norm_type", "rms", "hf_rms")
  return _llama(hub, 1e-5) | {
    "qk_norm": "head_after_rope",
    "moe": {
      "num_experts": _one(hub, "num_experts"),
      "d_expert": hub.size("intermediate_size"),
      "router": top_k(k, renormalize),
      "num_shared_experts": shared,
    },
  }


def _one(hub: HubConfig, name: str, least: int = 1) -> int:
  """A number, or a list that says the same of every layer."""
  value = hub.take(name)
  if isinstance(value, list) and value:
    hub.expect(name, [value[0]] * len(value))
    hub = HubConfig({name: value[0]}, hub.where)
  return hub.size(name, least=least)


def _llama(hub: HubConfig, eps: float) -> dict[str, Any]:
  """What all Llama-like families spell alike."""
  hub.expect("hidden_act", "silu")
  for name in ("attention_bias", "mlp_bias"):
    hub.expect(name, False)
  width, heads = hub.size("hidden_size"), hub.size("num_attention_heads")
  return rope(hub) | {
    "vocab_size": hub.size("vocab_size"),
    "d_model": width,
    "num_layers": hub.size("num_hidden_layers", most=MAX_LAYERS),
    "num_heads": heads,
    "num_kv_heads": hub.size("num_key_value_heads", default=heads),
    "head_dim": hub.size(
      "head_dim", "attention_head_dim", default=width // heads
    ),
    "qk_norm": "none",
    "norm_eps": hub.number("rms_norm_eps", default=eps),
    "tie_embeddings": hub.flag("tie_word_embeddings", default=False),
  }
