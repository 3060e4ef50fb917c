# SPDX-License-Identifier: Apache-2.0
"""A hub's folder as a `ModelConfig` and a model's variables."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import Config, ModelConfig
from moejax.convert import dbrx, hub_models, hunyuan, jetmoe, llama
from moejax.convert.hub_config import HubConfig
from moejax.convert.rules import Rule
from moejax.errors import DataError
from moejax.progress import progress_bar

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Family:
  """How one `model_type` is read.

  Attributes:
    read_config: config.json -> options of `ModelConfig`.
    rules: the tensors of a model of that config.
  """

  read_config: Callable[[HubConfig], dict[str, Any]]
  rules: Callable[[ModelConfig], Iterable[Rule]]


FAMILIES = {
  "olmoe": Family(hub_models.olmoe, llama.olmoe),
  "flex_olmo": Family(hub_models.flex_olmo, llama.flex_olmo),
  "qwen3_moe": Family(hub_models.qwen3_moe, llama.olmoe),
  "mixtral": Family(hub_models.mixtral, llama.mixtral),
  "jetmoe": Family(hub_models.jetmoe, jetmoe.jetmoe),
  "dbrx": Family(hub_models.dbrx, dbrx.dbrx),
  "hunyuan": Family(hub_models.hunyuan_large, hunyuan.hunyuan),
  "hunyuan_v1_moe": Family(hub_models.hunyuan_v1_moe, hunyuan.hunyuan),
}


def load_hf(
  folder: str | Path, dtype: str = "bfloat16"
) -> tuple[ModelConfig, dict[str, Any]]:
  """Reads a published checkpoint, layers apart.

  Args:
    folder: with config.json and safetensors, in one file or with an index.
    dtype: that the model computes in; the weights keep theirs.

  Returns:
    The config (`scan_layers=False`) and the variables of its `Transformer`.

  Raises:
    DataError: a missing or damaged file, an architecture or option that is not
      known here, or a tensor that is missing, unknown or misshapen.
  """
  folder = Path(folder)
  family, config = read_hub_config(folder, dtype)
  rules = list(family.rules(config))
  with open_tensors(folder) as tensors:
    check_tensors(rules, tensors)
    variables: dict[str, Any] = {}
    with progress_bar("reading tensors", len(rules)) as bar:
      for rule in rules:
        found = [tensors.read(name) for name in rule.names]
        for path, leaf in zip(rule.paths, rule.load(found), strict=True):
          put(variables, path, leaf)
        bar.advance()
  return config, variables


def read_hub_config(
  folder: Path, dtype: str = "bfloat16"
) -> tuple[Family, ModelConfig]:
  """The family and the config of a hub's folder; unknown keys are listed.

  Raises:
    DataError: no readable config.json, another architecture, or an option that
      the architecture cannot express.
  """
  values = _json(folder / "config.json")
  kind = values["model_type"] if "model_type" in values else None
  if kind not in FAMILIES:
    raise DataError(
      f"{folder}: model_type {kind!r} is not one of {', '.join(FAMILIES)}"
    )
  hub = HubConfig(values, f"{folder}/config.json")
  options = FAMILIES[kind].read_config(hub)
  if hub.unread():
    print(f"note: not read from config.json: {', '.join(hub.unread())}")
  options |= {"dtype": dtype, "scan_layers": False}
  return FAMILIES[kind], Config.from_dict({"model": options}).model


class Tensors:
  """The tensors of a folder, read one at a time from memory-mapped files."""

  def __init__(self, files: Mapping[str, Any]):
    self._files = files

  def names(self) -> set[str]:
    return set(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    return self._files[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
  """Opens all safetensors of a folder.

  Raises:
    DataError: there are none, one that the index names is missing, or a file
      is damaged.
  """
  from safetensors import SafetensorError, safe_open

  with contextlib.ExitStack() as stack:
    files = {}
    for path in _shards(folder):
      try:
        file = stack.enter_context(safe_open(path, framework="np"))
      except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is damaged or truncated: {e}") from e
      files |= dict.fromkeys(file.keys(), file)
    yield Tensors(files)


def _shards(folder: Path) -> list[Path]:
  if (folder / INDEX).exists():
    named = sorted(set(_json(folder / INDEX)["weight_map"].values()))
    missing = [name for name in named if not (folder / name).exists()]
    if missing:
      raise DataError(f"{folder}: {INDEX} names {missing[0]}, which is missing")
    return [folder / name for name in named]
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  pickles = [p.name for p in folder.glob("*.bin")]
  why = f"; {pickles[0]} is a pickle, which may run code" if pickles else ""
  raise DataError(f"{folder} holds no {SINGLE} and no {INDEX}{why}")


def check_tensors(rules: Iterable[Rule], tensors: Tensors) -> None:
  """Every tensor of the rules is there, of its shape, and none else.

  Raises:
    DataError: naming the first tensor that is not so.
  """
  unknown = tensors.names()
  for rule in rules:
    for name, shape in zip(rule.names, rule.shapes):
      if name not in unknown:
        raise DataError(f"no tensor {name} {shape} in the checkpoint")
      if tensors.shape(name) != shape:
        raise DataError(
          f"tensor {name} is {tensors.shape(name)}, config.json says {shape}"
        )
      unknown.remove(name)
  if unknown:
    raise DataError(
      f"{len(unknown)} tensors that this architecture does not have, such as "
      f"{min(unknown)}"
    )


def put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  """Sets a leaf of a nested dict."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def _json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise DataError(f"{path} is missing") from None
  except (OSError, ValueError) as e:
    raise DataError(f"{path} is not readable: {e}") from e
