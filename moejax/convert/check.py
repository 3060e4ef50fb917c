# SPDX-License-Identifier: Apache-2.0
"""Whether a hub's folder and a run's folder are the same model."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import runs
from moejax.checkpoint import CheckpointReader, LeafReader
from moejax.config import Config, ModelConfig, config_after, differences
from moejax.convert import hub_files
from moejax.convert.from_hf import read_tokenizer
from moejax.convert.hub_export import architecture
from moejax.convert.load import Family, matching_rules, read_hub_config
from moejax.convert.to_hf import ITEMS, hub_tensors
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError, UserError
from moejax.memory import device_memory
from moejax.models import Rows, build, count
from moejax.progress import format_bytes, progress_bar

LOGITS_TOLERANCE = 1e-4  # relative, float32
_TEXT = "The quick brown fox jumps over the lazy dog, 12 times: "
_ROWS, _LENGTH = 2, 24


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the result; `same` is None where nothing could be compared."""

  what: str
  same: bool | None
  text: str


def check(
  first: str | os.PathLike, second: str | os.PathLike, step: int | None = None
) -> list[Finding]:
  """Compares config, tokenizer, every tensor, and logits if they fit.

  Args:
    first, second: a hub's folder and a run's, in either order.
    step: of the run's checkpoint; None takes the newest.

  Raises:
    UserError: not one of each, or one that cannot be read.
  """
  hub, run = _sort(Path(first), Path(second))
  family, theirs = read_hub_config(hub)
  # Of the newest that is whole: what the export took, too.
  checkpoints = CheckpointReader(runs.checkpoint_folder(run))
  step, _, leaves = checkpoints.open_leaves(ITEMS, step)
  config = config_after(runs.read_config(run), step)
  lines = differences(_plain(config.model), _plain(theirs), "model.")
  findings = [Finding("config", not lines, "; ".join(lines) or "same model")]
  if lines:
    return findings
  words = runs.read_tokenizer(run)
  findings.append(_check_tokenizer(hub, words))
  findings.append(_check_tensors(hub, leaves, family, config))
  if not findings[-1].same:
    return findings
  return [*findings, _check_logits(hub, run, family, config, words, step)]


def _sort(first: Path, second: Path) -> tuple[Path, Path]:
  """(hub's folder, run's folder)."""
  runs_ = [path for path in (first, second) if (path / "checkpoints").is_dir()]
  if len(runs_) != 1:
    raise DataError(
      f"give a hub's folder and a run's; {len(runs_)} of {first} and {second} "
      "have a checkpoints/ in them"
    )
  (run,) = runs_
  return (second if run == first else first), run


def _plain(model: ModelConfig) -> dict[str, Any]:
  return Config(model=architecture(model)).to_dict()["model"]


def _check_tokenizer(hub: Path, words: Tokenizer) -> Finding:
  try:
    theirs = read_tokenizer(hub)
  except UserError as e:
    return Finding("tokenizer", None, str(e))
  if theirs.digest == words.digest:
    return Finding("tokenizer", True, "same file")
  same = theirs.encode(_TEXT).tolist() == words.encode(_TEXT).tolist()
  text = "other files, same ids" if same else "other ids for the same text"
  return Finding("tokenizer", same, text)


def _check_tensors(
  hub: Path, leaves: LeafReader, family: Family, config: Config
) -> Finding:
  """Equal bytes, or the largest error where the dtype was changed."""
  equal, cast, worst = 0, 0, (0.0, "")
  with hub_files.open_tensors(hub) as tensors:
    rules = matching_rules(family, config.model, tensors)
    with progress_bar("comparing tensors", len(rules)) as bar:
      for rule in rules:
        mine = hub_tensors(rule, leaves, config.model)
        for name, one in zip(rule.names, mine, strict=True):
          other = tensors.read(name)
          if one.dtype == other.dtype:
            equal += np.array_equal(_bits(one), _bits(other))
          else:
            cast += 1
          worst = max(worst, (_error(one, other), name))
        bar.advance()
  total = sum(len(rule.names) for rule in rules)
  # bfloat16 keeps 8 bits.
  same = equal + cast == total and worst[0] <= (2**-8 if cast else 0)
  text = f"{equal} of {total} byte-equal"
  if cast:
    text += f", {cast} of another dtype, largest relative error {worst[0]:.1e}"
  elif not same:
    text += f"; largest relative error {worst[0]:.1e} in {worst[1]}"
  return Finding("tensors", same, text)


def _bits(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _error(one: np.ndarray, other: np.ndarray) -> float:
  one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
  scale = np.abs(other).max(initial=0.0) or 1.0
  return float(np.abs(one - other).max(initial=0.0) / scale)


def _check_logits(hub, run, family: Family, config, words, step) -> Finding:
  if not family.model_class:
    return Finding("logits", None, "transformers does not have this model")
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      return Finding("logits", None, f"not compared: no {package} here ([hf])")
  needed = 2 * 4 * count(config.model).num_params
  has = device_memory(jax.devices()[0])
  if has is not None and needed > has:
    return Finding(
      "logits", None,
      f"not compared: both models in float32 take {format_bytes(needed)}, "
      f"this machine has {format_bytes(has)}",
    )  # fmt: skip
  tokens = _tokens(words, config.model.vocab_size)
  theirs = _their_logits(hub, tokens)
  ours = _our_logits(run, config, tokens, step)
  error = _error(ours, theirs)
  greedy = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
  text = (
    f"relative error {error:.1e} in float32, {greedy:.0%} of {tokens.size} "
    "next tokens the same"
  )
  return Finding("logits", error < LOGITS_TOLERANCE, text)


def _tokens(words: Tokenizer, vocab_size: int) -> np.ndarray:
  """A row of text and one of anything."""
  ids = np.resize(words.encode(_TEXT * 4), _LENGTH)
  rng = np.random.default_rng(0)
  rest = rng.integers(0, vocab_size, (_ROWS - 1, _LENGTH))
  return np.concatenate([ids[None], rest]).astype(np.int32)


def _their_logits(hub: Path, tokens: np.ndarray) -> np.ndarray:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    hub, dtype=torch.float32, attn_implementation="eager",
    trust_remote_code=False, local_files_only=True,
  )  # fmt: skip
  with torch.no_grad():
    return model.eval()(torch.tensor(tokens).long()).logits.numpy()


def _our_logits(run, config, tokens: np.ndarray, step) -> np.ndarray:
  model = build(dataclasses.replace(config.model, dtype="float32"))
  variables = runs.load_run(run, step).variables
  B, T = tokens.shape
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))

  @jax.jit
  def logits(variables):
    hidden = model.apply(variables, tokens, rows).hidden_BTD
    return model.apply(variables, hidden, method="logits")

  return np.asarray(logits(variables))
