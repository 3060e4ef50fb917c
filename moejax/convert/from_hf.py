# SPDX-License-Identifier: Apache-2.0
"""A hub's folder as a run's folder, one tensor at a time."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moejax import runs
from moejax.checkpoint import CheckpointReader, StepWriter
from moejax.checkpoint.leaves import Leaf, describe
from moejax.config import Config, DataConfig, ModelConfig
from moejax.convert import hub_files, tiktoken
from moejax.convert.load import matching_rules, read_hub_config
from moejax.convert.rules import Rule
from moejax.data.tokenizer import FileTokenizer, Tokenizer, load_tokenizer
from moejax.errors import ConfigError, DataError, UserError
from moejax.files import write_atomically
from moejax.models import build
from moejax.progress import format_bytes, progress_bar
from moejax.runlock import RunLock

HUB = "hub"  # the folder of a converted run that keeps the hub's own files
STEP = 0


def from_hf(
  source: str | os.PathLike,
  target: str | os.PathLike,
  dtype: str | None = None,
  tokenizer: str | None = None,
) -> None:
  """Makes a run's folder, with one checkpoint, of a hub's folder.

  Tensors pass through memory one rule at a time: at most about two and a half
  times the largest tensor that we hold, all experts' matrices of one kind in a
  layer. Stopped and called again, it goes on with the tensors that are missing.

  Args:
    source: with config.json, safetensors and a tokenizer.
    target: the run's folder; made if missing.
    dtype: of the weights; None keeps theirs.
    tokenizer: `byte` or a tokenizer.json, instead of the source's own.

  Raises:
    UserError: a source that cannot be read or expressed, a target that holds
      something else, or a disk that is full; nothing that looks whole is left.
  """
  source, target = Path(source), Path(target)
  family, model = read_hub_config(source)
  words = read_tokenizer(source, tokenizer)
  if words.vocab_size > model.vocab_size:
    raise DataError(
      f"the tokenizer of {source} has {words.vocab_size} tokens, its embedding "
      f"{model.vocab_size} rows; give the right one with --tokenizer"
    )
  with hub_files.open_tensors(source) as tensors:
    rules = matching_rules(family, model, tensors)
    digest = hub_files.source_digest(source, str(dtype), words.digest)
    table = leaf_table(model, rules, tensors, dtype)
    with RunLock(target):
      if is_done(target, digest):
        print(f"{target} holds this checkpoint already")
        return
      _write_leaves(target, rules, tensors, table, digest, model, words)
      _write_files(source, target, model, words)
  size = sum(leaf.num_bytes for leaf in table.values())
  print(f"{target}: {format_bytes(size)} of weights; try")
  print(f'  moejax generate {target} --prompt="..."')


def leaf_table(
  model: ModelConfig, rules: Iterable[Rule], tensors: Any, dtype: str | None
) -> dict[str, Leaf]:
  """Names, shapes and stored dtypes of the model's variables."""
  shapes = describe(runs.abstract_variables(build(model)))
  table = {}
  for rule in rules:
    stored = [tensors.dtype(name) for name in rule.names]
    kept = dtype or str(jnp.result_type(*stored))
    for path in rule.paths:
      table["/".join(path)] = Leaf(shapes["/".join(path)].shape, kept)
  assert table.keys() == shapes.keys()
  return table


def read_tokenizer(source: Path, spec: str | None = None) -> Tokenizer:
  """The tokenizer of a hub's folder.

  Raises:
    DataError: it has none that is read here.
  """
  if spec is not None:
    return load_tokenizer(spec)
  if (source / "tokenizer.json").exists():
    return load_tokenizer(source)
  kind = hub_files.read_json(source / "config.json")["model_type"]
  ranks = sorted(source.glob("*.tiktoken"))
  if ranks and kind in tiktoken.DIALECTS:
    text = tiktoken.read_tiktoken(ranks[0], tiktoken.DIALECTS[kind])
    return FileTokenizer(source / "tokenizer.json", text)
  found = sorted(p.name for p in source.glob("tokenizer*")) or ["nothing"]
  raise DataError(
    f"{source} has no tokenizer.json (but {', '.join(found)}); make one with "
    "transformers' AutoTokenizer(...).save_pretrained, or give "
    "--tokenizer=FILE (or byte)"
  )


def _write_leaves(target, rules, tensors, table, digest, model, words) -> None:
  folder = runs.checkpoint_folder(target)
  if STEP not in CheckpointReader(folder).steps():
    writer = StepWriter(folder, STEP, table, digest)
    pending = set(writer.pending())
    todo = [
      rule for rule in rules if pending & {"/".join(p) for p in rule.paths}
    ]
    if len(todo) < len(rules):
      print(f"going on: {len(rules) - len(todo)} of {len(rules)} are done")
    with progress_bar("converting tensors", len(todo)) as bar:
      for rule in todo:
        _write_rule(rule, tensors, table, writer, pending)
        bar.advance()
    writer.commit(converted_meta(_config(target, model, words), words, digest))


def converted_meta(
  config: Config, words: Tokenizer, digest: str
) -> dict[str, Any]:
  """What a checkpoint of converted weights says of itself."""
  return {
    "step": STEP,
    "tokens_seen": 0,
    "config": config.to_dict(),
    "tokenizer": words.digest,
    "converted_from": digest,
    "versions": runs.versions(),
    "git_commit": runs.git_commit(),
  }


def _write_rule(rule, tensors, table, writer, pending) -> None:
  """A function, so that nothing of it is in memory when the next begins."""
  found = [tensors.read(name) for name in rule.names]
  leaves = rule.load(found)
  del found
  for path, leaf in zip(rule.paths, leaves, strict=True):
    name = "/".join(path)
    if name in pending:
      dtype = jnp.dtype(table[name].dtype)
      writer.write(name, leaf.astype(dtype, copy=False))


def is_done(target: Path, digest: str) -> bool:
  """Whether the target is this conversion, finished.

  Raises:
    ConfigError: it is something else.
  """
  checkpoints = CheckpointReader(runs.checkpoint_folder(target))
  started = (target / "config.json").exists()
  steps = checkpoints.steps()
  if not steps:
    if started:
      raise ConfigError(f"{target} is the folder of a run; use another one")
    return False
  meta = checkpoints.read_meta(max(steps))
  if "converted_from" not in meta or meta["converted_from"] != digest:
    raise ConfigError(f"{target} holds another checkpoint; use another folder")
  return started


def _write_files(source, target, model, words) -> None:
  """What makes the folder a run's, config.json last."""
  try:
    hub_files.copy_carried(source, target / HUB)
    text = (source / "config.json").read_text()
    write_atomically(target / HUB / "config.json", text)
  except OSError as e:
    raise UserError(f"cannot write {target / HUB}: {e.strerror or e}") from e
  runs.write_files(target, _config(target, model, words), words)


def _config(target: Path, model: ModelConfig, words: Tokenizer) -> Config:
  name = tokenizer_name(target, words)
  return Config(
    model=model, data=dataclasses.replace(DataConfig(), tokenizer=name)
  )


def tokenizer_name(target: Path, words: Tokenizer) -> str:
  """`data.tokenizer` of a converted run, which keeps a tokenizer of its own."""
  path = os.path.abspath(target / "tokenizer.json")
  return "byte" if words.name == "byte" else path


def hub_config(folder: Path) -> dict[str, Any] | None:
  """The config.json that a converted run keeps; None for another run."""
  path = folder / HUB / "config.json"
  return json.loads(path.read_text()) if path.exists() else None
