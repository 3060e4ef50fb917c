# SPDX-License-Identifier: Apache-2.0
"""config.json of the published models reads as configs/ has them.

Values and spellings as the authors published them; keys that only concern
tokens, dropout or caches are left out.
"""

import pytest

from moejax.config import Config
from moejax.convert.hub_config import HubConfig
from moejax.convert.hub_export import architecture
from moejax.convert.load import FAMILIES
from moejax.models import count
from tests.test_published import PUBLISHED, read

HUB = {
  "olmoe_1b_7b": {
    "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 1024, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 50304, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16", "router_aux_loss_coef": 0.01,
  },
  "jetmoe_8b": {
    "model_type": "jetmoe", "activation_function": "silu", "glu": True,
    "bias": True, "ffn_hidden_size": 5632, "hidden_size": 2048,
    "kv_channels": 128, "layer_norm_epsilon": 1e-5, "moe_num_experts": 8,
    "moe_top_k": 2, "num_attention_heads": 32, "num_key_value_heads": 16,
    "num_layers": 24, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": 32000, "torch_dtype": "bfloat16",
  },
  "dbrx_132b": {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40,
    "max_seq_len": 32768, "vocab_size": 100352, "tie_word_embeddings": False,
    "attn_config": {
      "model_type": "", "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000,
    },
    "ffn_config": {
      "model_type": "", "ffn_hidden_size": 10752, "moe_jitter_eps": 0,
      "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4,
    },
    "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "auto_map": {"AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM"},
  },
  "hunyuan_large": {
    "model_type": "hunyuan", "architectures": ["HunYuanForCausalLM"],
    "attention_bias": False, "attention_head_dim": 80, "cla_share_factor": 2,
    "hidden_act": "silu", "hidden_size": 6400, "intermediate_size": 18304,
    "mlp_bias": False, "moe_drop_tokens": False,
    "moe_random_routing_dropped_token": False, "moe_topk": 1,
    "norm_type": "rms", "num_attention_heads": 80, "num_experts": 16,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "num_shared_expert": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": {"alpha": 100000.0, "factor": 1.0, "type": "dynamic"},
    "tie_word_embeddings": True, "use_cla": True, "use_mixed_mlp_moe": True,
    "use_qk_norm": True, "vocab_size": 128512,
    "max_position_embeddings": 262144, "torch_dtype": "bfloat16",
  },
  "mixtral_8x7b": {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    "torch_dtype": "bfloat16",
  },
  "qwen3_30b_a3b": {
    "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48,
    "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936, "torch_dtype": "bfloat16",
  },
  "flex_olmo_7x7b": {
    "model_type": "flex_olmo", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "norm_topk_prob": False,
    "num_attention_heads": 32, "num_experts": 7, "num_experts_per_tok": 5,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "vocab_size": 100352,
    "torch_dtype": "bfloat16",
  },
  # After the authors' own conversion to bfloat16; the fp8 one is refused.
  "deepseek_v3": {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {
      "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
      "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
      "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
    "vocab_size": 129280, "torch_dtype": "bfloat16",
  },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_is_ours(name):
  hub = HubConfig(HUB[name])
  options = FAMILIES[HUB[name]["model_type"]].read_config(hub)
  model = Config.from_dict({"model": options | {"scan_layers": False}}).model
  assert architecture(model) == architecture(read(name).model)
  counts = count(model)
  assert (counts.num_params, counts.num_active_params) == PUBLISHED[name]
  # Nothing that a person would have to think about.
  assert not hub.unread()


def test_jetmoes_early_spelling():
  early = dict(HUB["jetmoe_8b"])
  for new, old in (
    ("num_layers", "n_layer"), ("hidden_size", "n_embd"),
    ("num_key_value_heads", "n_head"),
  ):  # fmt: skip
    early[old] = early.pop(new)
  one, two = (
    FAMILIES["jetmoe"].read_config(HubConfig(values))
    for values in (HUB["jetmoe_8b"], early)
  )
  assert one == two
