# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint as a hub's folder, one tensor at a time."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import runs, storage
from moejax.checkpoint import CheckpointReader, LeafReader
from moejax.checkpoint.leaves import describe
from moejax.config import Config, ModelConfig, config_after, differences
from moejax.convert import hub_files
from moejax.convert.from_hf import HUB, hub_config
from moejax.convert.hub_config import HubConfig
from moejax.convert.hub_export import architecture
from moejax.convert.hub_files import Entry
from moejax.convert.hub_tokenizer import special_ids, write_tokenizer
from moejax.convert.load import FAMILIES, Family
from moejax.convert.rules import Rule
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import ConfigError, DataError, UserError
from moejax.files import write_atomically
from moejax.models import Variables
from moejax.progress import format_bytes, progress_bar

ITEMS = ("params", "router_state")
SHARD_BYTES = 5_000_000_000  # the hub's own custom
JOURNAL = "unfinished_export.json"
MEMORY = "memory"  # where an export is from that is of no run


def to_hf(
  source: str | os.PathLike,
  target: str | os.PathLike,
  family: str | None = None,
  dtype: str | None = None,
  step: int | None = None,
  shard_bytes: int = SHARD_BYTES,
  ema: bool = False,
) -> None:
  """Makes a hub's folder of a run's checkpoint.

  One rule's tensors are in memory at a time. Stopped and called again, it goes
  on with the files that are missing; config.json comes last.

  Args:
    source: folder of a run, trained or converted.
    target: new or empty.
    family: a model_type; None takes the one it came from, or the first whose
      config.json can say all that this model is.
    dtype: of the weights; None keeps theirs.
    step: of the checkpoint; None takes the newest.
    shard_bytes: size of one file, at least one rule's tensors.
    ema: take the moving average of the weights.

  Raises:
    UserError: no family fits, the target holds something else, or the disk is
      full.
  """
  storage.require_folder(target, "the export")
  source = Path(source)
  config, words = runs.read_config(source), runs.read_tokenizer(source)
  checkpoints = CheckpointReader(runs.checkpoint_folder(source))
  items = ITEMS
  if ema:
    runs.require_average(config, source)
    items = (runs.EMA, *ITEMS[1:])
  found, meta, leaves = checkpoints.open_leaves(items, step)
  leaves = _Averaged(leaves) if ema else leaves
  config = config_after(config, found)
  name, values = hub_values(config.model, words, hub_config(source), family)
  mark = {"from": runs.origin_of(source), "step": found}
  mark |= {"tokenizer": meta["tokenizer"]} | ({"ema": True} if ema else {})
  export = Export(Path(target), name, values, config.model, leaves, dtype)
  size = export.write(words, source / HUB, mark, shard_bytes)
  print(f"{target}: {name}, {format_bytes(size)} of weights, step {found}")


class _Averaged:
  """A checkpoint's leaves, with averaged parameters in place of the last."""

  def __init__(self, leaves: LeafReader):
    self._leaves = leaves
    start = f"{runs.EMA}/"
    self.table = leaves.table | {
      f"params/{name.removeprefix(start)}": leaf
      for name, leaf in leaves.table.items()
      if name.startswith(start)
    }

  def read(self, name: str, index: int | None = None) -> np.ndarray:
    first, slash, rest = name.partition("/")
    first = runs.EMA if first == "params" else first
    return self._leaves.read(first + slash + rest, index)


def save_hf(
  target: str | os.PathLike,
  config: ModelConfig,
  variables: Variables,
  tokenizer: Tokenizer,
  family: str | None = None,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Makes a hub's folder of a model in memory: the way back from `load_hf`.

  Args:
    target: new or empty.
    config, variables, tokenizer: the model, layers stacked or apart.
    family, dtype, shard_bytes: as in `to_hf`.

  Raises:
    UserError: no family fits, the target is not empty, or the disk is full.
  """
  name, values = hub_values(config, tokenizer, None, family)
  leaves = TreeReader(variables)
  export = Export(Path(target), name, values, config, leaves, dtype)
  export.write(tokenizer, None, {"from": MEMORY}, shard_bytes)


class TreeReader:
  """Leaves of a tree in memory, read as those of a checkpoint."""

  def __init__(self, variables: Variables):
    self.table = describe(variables)
    self._leaves = dict(zip(self.table, jax.tree.leaves(variables)))

  def read(self, name: str, index: int | None = None) -> np.ndarray:
    leaf = np.asarray(self._leaves[name])
    return leaf if index is None else leaf[index]


@dataclasses.dataclass(frozen=True)
class Export:
  """A model on its way to a hub's folder.

  Attributes:
    target: the folder.
    family: its model_type.
    values: its config.json.
    model: the config of what `leaves` holds.
    leaves: the weights.
    dtype: to write them in; None keeps theirs.
  """

  target: Path
  family: str
  values: dict[str, Any]
  model: ModelConfig
  leaves: LeafReader | TreeReader | _Averaged
  dtype: str | None

  def write(
    self,
    words: Tokenizer,
    carried: Path | None,
    mark: dict[str, Any],
    shard_bytes: int,
  ) -> int:
    """Writes all files, config.json last; returns the bytes of the weights."""
    entries = [
      (rule, rule_entries(rule, self.leaves, self.model, self.dtype))
      for rule in FAMILIES[self.family].rules(self.model)
    ]
    shards = _shards(entries, shard_bytes)
    mark |= {
      "dtype": str(self.dtype), "family": self.family, "shards": len(shards),
      "shard_bytes": shard_bytes,
    }  # fmt: skip
    target = self.target
    try:
      _begin(target, mark)
      index = _write_shards(target, shards, self.leaves, self.model)
      _write_tokenizer(words, carried, target)
      if len(shards) > 1:
        text = json.dumps(index, indent=2)
        write_atomically(target / hub_files.INDEX, text)
      text = json.dumps(_stamped(self.values, entries), indent=2) + "\n"
      write_atomically(target / "config.json", text)
      (target / JOURNAL).unlink()
    except OSError as e:
      raise UserError(
        f"cannot write {e.filename or target}: {e.strerror or e}; the same "
        "command goes on with the files that are missing"
      ) from e
    return sum(entry.num_bytes for _, some in entries for entry in some)


def hub_values(
  model: ModelConfig,
  words: Tokenizer,
  kept: dict[str, Any] | None,
  wanted: str | None,
) -> tuple[str, dict[str, Any]]:
  """The family and the config.json of a model.

  Args:
    model, words: what is exported.
    kept: the config.json it came with, which is used as long as it is true.
    wanted: a model_type; None takes what fits.

  Raises:
    ConfigError: no family can say what it is, or the wanted one cannot.
  """
  if kept is not None and wanted in (None, kept["model_type"]):
    if not _lost(FAMILIES[kept["model_type"]], kept, model):
      kept.pop("auto_map", None)  # names code that is not carried along
      return kept["model_type"], kept
  if wanted is not None and wanted not in FAMILIES:
    raise ConfigError(f"--family={wanted} is not one of {', '.join(FAMILIES)}")
  closest = ("", [""] * 99)
  for name in [wanted] if wanted else FAMILIES:
    family = FAMILIES[name]
    head = {"architectures": [family.model_class]} if family.model_class else {}
    values = head | {"model_type": name} | family.write_config(model)
    lost = _lost(family, values, model)
    if not lost:
      # Also those that are not there: classes have ids of their own.
      return name, values | special_ids(words)
    closest = min(closest, (name, lost), key=lambda x: len(x[1]))
  raise ConfigError(
    f"no family of the hub is this model; {closest[0]} comes nearest and "
    f"would lose {'; '.join(closest[1])}"
  )


def _lost(family: Family, values: dict[str, Any], model: ModelConfig):
  """Options that reading the config.json back does not give."""
  try:
    options = family.read_config(HubConfig(values))
    back = Config.from_dict({"model": options | {"scan_layers": False}}).model
  except UserError as e:
    return [str(e)]
  mine, theirs = (
    Config(model=architecture(m)).to_dict()["model"] for m in (model, back)
  )
  return differences(mine, theirs, "model.")


def rule_entries(
  rule: Rule, leaves: LeafReader, model: ModelConfig, dtype: str | None
) -> list[Entry]:
  """What a rule writes."""
  stored = [leaves.table[leaf_of(path, model)[0]].dtype for path in rule.paths]
  kept = dtype or str(jnp.result_type(*stored))
  return [Entry(n, s, kept) for n, s in zip(rule.names, rule.shapes)]


def leaf_of(
  path: tuple[str, ...], model: ModelConfig
) -> tuple[str, int | None]:
  """A leaf's name as this model stores it, and its place in a stacked one."""
  collection, layers, *rest = path
  name, _, repeat = layers.partition("_")
  if not model.scan_layers or name != "repeats":
    return "/".join(path), None
  return "/".join((collection, name, *rest)), int(repeat)


def hub_tensors(
  rule: Rule, leaves: LeafReader, model: ModelConfig
) -> Sequence[np.ndarray]:
  """The tensors of a rule, from a run's leaves."""
  found = [leaves.read(*leaf_of(path, model)) for path in rule.paths]
  return rule.save(found)


def _shards(
  entries: Iterable[tuple[Rule, list[Entry]]], limit: int
) -> list[list[tuple[Rule, list[Entry]]]]:
  """The rules of each file, wider dtypes first: offsets stay aligned."""
  shards: list[list[tuple[Rule, list[Entry]]]] = [[]]
  size = 0
  for rule, some in entries:
    more = sum(entry.num_bytes for entry in some)
    if shards[-1] and size + more > limit:
      shards.append([])
      size = 0
    shards[-1].append((rule, some))
    size += more
  wide = lambda pair: -jnp.dtype(pair[1][0].dtype).itemsize
  return [sorted(shard, key=wide) for shard in shards]


def _begin(target: Path, mark: dict[str, Any]) -> None:
  """Makes the folder, or goes on with one that this export began."""
  target.mkdir(parents=True, exist_ok=True)
  for torn in target.glob(f"{JOURNAL}.*.partial"):  # killed as it began
    torn.unlink(missing_ok=True)
  inside = sorted(path.name for path in target.iterdir())
  if JOURNAL in inside:
    begun = hub_files.read_json(target / JOURNAL)
    if begun["from"] == mark["from"] == MEMORY:
      # Nothing tells whether these still are the weights, or the tokenizer.
      for name in inside:
        if name != JOURNAL:
          (target / name).unlink()
    elif begun != mark:
      raise DataError(
        f"{target} holds an unfinished export of {begun}; delete it or use "
        "another folder"
      )
  elif inside:
    raise DataError(f"{target} is not empty (it has {inside[0]})")
  write_atomically(target / JOURNAL, json.dumps(mark))


def _write_shards(target, shards, leaves, model) -> dict[str, Any]:
  """All files of tensors; returns the index."""
  weight_map, total = {}, 0
  with progress_bar("writing tensors", sum(map(len, shards))) as bar:
    for i, shard in enumerate(shards):
      name = hub_files.SINGLE
      if len(shards) > 1:
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
      entries = [entry for _, some in shard for entry in some]
      if not (target / name).exists():
        arrays = _arrays(shard, leaves, model, bar)
        hub_files.write_safetensors(target / name, entries, arrays)
      else:
        bar.advance(len(shard))
      weight_map |= {entry.name: name for entry in entries}
      total += sum(entry.num_bytes for entry in entries)
  return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _arrays(shard, leaves, model, bar) -> Iterator[np.ndarray]:
  for rule, entries in shard:
    tensors = list(hub_tensors(rule, leaves, model))
    for entry in entries:  # each is let go when it is written
      yield tensors.pop(0).astype(jnp.dtype(entry.dtype), copy=False)
    bar.advance()


def _write_tokenizer(
  words: Tokenizer, carried: Path | None, target: Path
) -> None:
  """The tokenizer's files, the hub's own if the model came from there."""
  if carried is not None and carried.is_dir():
    copied = hub_files.copy_carried(carried, target)
    if not _agree(target / "tokenizer.json", words):
      for name in copied:  # they speak of other ids
        (target / name).unlink()
  file = target / "tokenizer.json"
  if not file.exists() or load_tokenizer(file).digest != words.digest:
    write_tokenizer(words, target)


def _agree(path: Path, words: Tokenizer) -> bool:
  """Whether what the hub says of its tokenizer holds for the run's too.

  It does where the ids are the same, and where the hub has no such file: then
  the run's was made of what it has.
  """
  if not path.exists():
    return True
  try:
    theirs = load_tokenizer(path)
  except DataError:  # a run that named another, as this one is of no use
    return False
  return (
    theirs.vocabulary() == words.vocabulary()
    and special_ids(theirs) == special_ids(words)
  )  # fmt: skip


def _stamped(values: dict[str, Any], entries) -> dict[str, Any]:
  """With the dtype of most of the weights, under the hub's older name."""
  sizes: dict[str, int] = {}
  for _, some in entries:
    for entry in some:
      sizes[entry.dtype] = sizes.setdefault(entry.dtype, 0) + entry.num_bytes
  values = {k: v for k, v in values.items() if k != "dtype"}
  return values | {"torch_dtype": max(sizes, key=sizes.__getitem__)}
