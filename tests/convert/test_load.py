# SPDX-License-Identifier: Apache-2.0
"""A hub's folder, whole and in parts, and what can be wrong in it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.convert import load_hf
from moejax.convert.hub_config import stack
from moejax.errors import DataError
from moejax.models import build, init_variables
from tests.convert import families as hf
from tests.convert.hub_folder import write

EACH = pytest.mark.parametrize("family", hf.FAMILIES, ids=lambda f: f.name)
OLMOE = hf.FAMILIES[0]


@EACH
def test_config_and_tree_are_those_of_the_model(family, tmp_path):
  config, variables = load_hf(write(tmp_path, family), dtype="float32")
  assert config == family.config
  shapes = jax.eval_shape(
    lambda: init_variables(build(config), jax.random.key(0))
  )
  assert jax.tree.map(np.shape, variables) == jax.tree.map(jnp.shape, shapes)


def test_shards_and_bfloat16(tmp_path):
  whole = {
    name: x.astype(ml_dtypes.bfloat16) for name, x in hf.tensors(OLMOE).items()
  }
  config, variables = load_hf(write(tmp_path, OLMOE, whole, shards=3))
  assert config.dtype == "bfloat16"
  leaf = variables["params"]["repeats_1"]["block_0"]["moe"]["w_up_EDF"]
  assert leaf.dtype == ml_dtypes.bfloat16
  want = whole["model.layers.1.mlp.experts.4.up_proj.weight"].T
  np.testing.assert_array_equal(leaf[4], want)


FUSED = ("olmoe", "mixtral", "qwen3_moe", "flex_olmo", "hunyuan_v1_moe")


@pytest.mark.parametrize("name", FUSED)
def test_experts_in_one_tensor(name, tmp_path):
  """The names that transformers 5 uses in memory."""
  family = next(f for f in hf.FAMILIES if f.name == name)
  fused, stacks = {}, {}
  for key, x in hf.tensors(family).items():
    key = key.replace("block_sparse_moe", "mlp")
    prefix, found, rest = key.partition(".experts.")
    if not found:
      fused[key] = x
      continue
    kind = rest.split(".")[1]
    kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(
      kind, kind
    )
    stacks.setdefault((prefix, kind), []).append(x)
  for (prefix, kind), xs in stacks.items():
    if kind == "down_proj":
      fused[f"{prefix}.experts.down_proj"] = np.stack(xs)
    if kind == "gate_proj":
      both = np.stack(xs), np.stack(stacks[prefix, "up_proj"])
      fused[f"{prefix}.experts.gate_up_proj"] = np.concatenate(both, axis=1)
  _, got = load_hf(write(tmp_path / "fused", family, fused))
  _, want = load_hf(write(tmp_path / "apart", family))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model_type": "llama"}, "'llama' is not one of olmoe, "),
    ({"num_experts": None}, "has no num_experts"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: scaling .longrope"),
    ({"num_experts": 8}, r"mlp.gate.weight is \(7, 24\), config.json says \(8"),
    (
      {"hidden_size": 32},
      r"embed_tokens.weight is \(53, 24\), config.json says",
    ),
    ({"num_hidden_layers": 1}, "tensors that this architecture does not have"),
  ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
  with pytest.raises(DataError, match=message):
    load_hf(write(tmp_path, OLMOE, **changes))


@pytest.mark.parametrize("family", hf.FAMILIES, ids=lambda f: f.name)
def test_a_gate_that_is_always_one_is_refused(family, tmp_path):
  """Renormalised at k = 1; read as not renormalised it would be silent."""
  keys = {"num_experts_per_tok": 1, "moe_topk": 1, "norm_topk_prob": True}
  changes = {k: v for k, v in keys.items() if k in family.hf_config}
  if family.name == "dbrx":
    changes = {"ffn_config": family.hf_config["ffn_config"] | {"moe_top_k": 1}}
  if family.name == "flex_olmo":
    changes["norm_topk_prob"] = True
  with pytest.raises(DataError, match="renormalised over one expert"):
    load_hf(write(tmp_path, family, **changes))


def test_flex_olmo_has_an_epsilon_of_its_own(tmp_path):
  family = next(f for f in hf.FAMILIES if f.name == "flex_olmo")
  config, _ = load_hf(write(tmp_path, family, rms_norm_eps=None))
  assert config.norm_eps == 1e-6


def test_a_missing_tensor_is_named(tmp_path):
  tensors = hf.tensors(OLMOE)
  del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
  with pytest.raises(DataError, match="no tensor model.layers.1.*3.up_proj"):
    load_hf(write(tmp_path, OLMOE, tensors))


def test_unknown_options_are_listed(tmp_path, capsys):
  load_hf(write(tmp_path, OLMOE, soft_cap=30.0))
  assert "note: not read from config.json: soft_cap" in capsys.readouterr().out


def test_missing_and_damaged_files(tmp_path):
  with pytest.raises(DataError, match="config.json is missing"):
    load_hf(tmp_path)
  write(tmp_path, OLMOE, shards=2)
  last = tmp_path / "model-00002-of-00002.safetensors"
  last.write_bytes(last.read_bytes()[:-100])
  with pytest.raises(DataError, match="is damaged or truncated"):
    load_hf(tmp_path)
  last.unlink()
  with pytest.raises(DataError, match="names model-00002-of.*, which is miss"):
    load_hf(tmp_path)
  (tmp_path / "model.safetensors.index.json").unlink()
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(DataError, match="pickle, which may run code"):
    load_hf(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(DataError, match="config.json is not readable"):
    load_hf(tmp_path)


@pytest.mark.parametrize(
  "kinds, prefix, pattern",
  [
    ("aaaa", "", "a"),
    ("abab", "", "ab"),
    ("caaa", "c", "a"),
    ("ccabab", "cc", "ab"),
    ("abc", "", "abc"),
  ],
)
def test_a_list_of_layers_as_prefix_and_pattern(kinds, prefix, pattern):
  found = stack(list(kinds))
  assert found["prefix"] == tuple(prefix)
  assert found["pattern"] == tuple(pattern)
