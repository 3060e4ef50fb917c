# SPDX-License-Identifier: Apache-2.0
"""A hub's folder as a `ModelConfig` and a model's variables."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moejax.config import Config, ModelConfig
from moejax.convert import (
  dbrx,
  deepseek,
  fused,
  hub_export,
  hub_models,
  hunyuan,
  jetmoe,
  llama,
)
from moejax.convert.hub_config import HubConfig
from moejax.convert.hub_files import (
  Tensors,
  check_tensors,
  open_tensors,
  read_json,
)
from moejax.convert.rules import Rule
from moejax.errors import DataError
from moejax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Family:
  """How one `model_type` is read.

  Attributes:
    read_config: config.json -> options of `ModelConfig`.
    write_config: the way back.
    rules: the tensors of a model of that config.
    model_class: transformers' name; empty if it has none.
  """

  read_config: Callable[[HubConfig], dict[str, Any]]
  write_config: Callable[[ModelConfig], dict[str, Any]]
  rules: Callable[[ModelConfig], Iterable[Rule]]
  model_class: str


FAMILIES = {
  "olmoe": Family(
    hub_models.olmoe, hub_export.olmoe, llama.olmoe, "OlmoeForCausalLM"
  ),
  "flex_olmo": Family(
    hub_models.flex_olmo, hub_export.flex_olmo, llama.flex_olmo,
    "FlexOlmoForCausalLM",
  ),
  "qwen3_moe": Family(
    hub_models.qwen3_moe, hub_export.qwen3_moe, llama.olmoe,
    "Qwen3MoeForCausalLM",
  ),
  "mixtral": Family(
    hub_models.mixtral, hub_export.mixtral, llama.mixtral,
    "MixtralForCausalLM",
  ),
  "jetmoe": Family(
    hub_models.jetmoe, hub_export.jetmoe, jetmoe.jetmoe, "JetMoeForCausalLM"
  ),
  "dbrx": Family(
    hub_models.dbrx, hub_export.dbrx, dbrx.dbrx, "DbrxForCausalLM"
  ),
  "deepseek_v3": Family(
    hub_models.deepseek_v3, hub_export.deepseek_v3, deepseek.deepseek_v3,
    "DeepseekV3ForCausalLM",
  ),
  # What both can hold goes to the one that transformers knows: it comes first.
  "hunyuan_v1_moe": Family(
    hub_models.hunyuan_v1_moe, hub_export.hunyuan_v1_moe, hunyuan.hunyuan,
    "HunYuanMoEV1ForCausalLM",
  ),
  "hunyuan": Family(
    hub_models.hunyuan_large, hub_export.hunyuan_large, hunyuan.hunyuan, ""
  ),
}  # fmt: skip


def load_hf(
  folder: str | Path, dtype: str | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Reads a published checkpoint, layers apart.

  Args:
    folder: with config.json and safetensors, in one file or with an index.
    dtype: that the model computes in; None: float32 if config.json says so,
      else bfloat16. The weights keep theirs.

  Returns:
    The config (`scan_layers=False`) and the variables of its `Transformer`.

  Raises:
    DataError: a missing or damaged file, an architecture or option that is not
      known here, or a tensor that is missing, unknown or misshapen.
  """
  folder = Path(folder)
  family, config = read_hub_config(folder, dtype)
  with open_tensors(folder) as tensors:
    rules = matching_rules(family, config, tensors)
    variables: dict[str, Any] = {}
    with progress_bar("reading tensors", len(rules)) as bar:
      for rule in rules:
        found = [tensors.read(name) for name in rule.names]
        for path, leaf in zip(rule.paths, rule.load(found), strict=True):
          put(variables, path, leaf)
        bar.advance()
  return config, variables


def read_hub_config(
  folder: Path, dtype: str | None = None
) -> tuple[Family, ModelConfig]:
  """The family and the config of a hub's folder; unknown keys are listed.

  Raises:
    DataError: no readable config.json, another architecture, or an option that
      the architecture cannot express.
  """
  values = read_json(folder / "config.json")
  kind = values["model_type"] if "model_type" in values else None
  if str(kind) not in FAMILIES:
    raise DataError(
      f"{folder}: model_type {kind!r} is not one of {', '.join(FAMILIES)}"
    )
  hub = HubConfig(values, f"{folder}/config.json")
  hub.expect("quantization_config", None)
  if "auto_map" in values:
    print(f"note: code that {folder} brings (auto_map) is not run")
  if dtype is None:
    stored = hub.take("torch_dtype", "dtype", default="bfloat16")
    dtype = "float32" if stored == "float32" else "bfloat16"
  options = FAMILIES[kind].read_config(hub)
  if hub.unread():
    print(f"note: not read from config.json: {', '.join(hub.unread())}")
  options |= {"dtype": dtype, "scan_layers": False}
  return FAMILIES[kind], Config.from_dict({"model": options}).model


def matching_rules(
  family: Family, config: ModelConfig, tensors: Tensors
) -> list[Rule]:
  """The rules of a model, for all tensors of a checkpoint and none else.

  Raises:
    DataError: naming the first tensor that is missing, unknown or misshapen.
  """
  rules = fused.meet(family.rules(config), tensors.names())
  # DeepSeek-V3's second prediction head stands behind the last layer.
  beyond = f"model.layers.{config.num_layers}."
  beyond = beyond if family is FAMILIES["deepseek_v3"] else None
  check_tensors(rules, tensors, beyond)
  return rules


def put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  """Sets a leaf of a nested dict."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf
