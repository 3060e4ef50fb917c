# SPDX-License-Identifier: Apache-2.0
"""The text that routers are watched on: named domains of files, in windows."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moejax import data
from moejax.config import DataConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError, DataError

Domains = Mapping[str, Sequence[str]]
Batch = dict[str, np.ndarray]


def parse_domains(entries: Sequence[str]) -> dict[str, list[str]]:
  """Sources by domain of `NAME=SOURCE` or `SOURCE`, named after its file.

  A file's name ends at its first dot.

  Raises:
    ConfigError: there are none, a name or a source is empty, or two have one
      name: of two sources in turn, the second might never be reached.
  """
  if not entries:
    raise ConfigError(
      "there is no text to watch the routers on; add --data=NAME=FILE, such as "
      "--data=code=src/*.py, once for each kind of text"
    )
  domains: dict[str, list[str]] = {}
  for entry in entries:
    name, equals, source = entry.partition("=")
    if not equals or "/" in name:  # the path of a file may have an = in it
      name, source = pathlib.PurePath(entry).name.partition(".")[0], entry
    if not name.strip() or not source:
      raise ConfigError(f"--data={entry} is not NAME=FILE")
    name = name.strip()
    if name in domains:
      raise ConfigError(
        f"--data={entry}: domain {name} is {domains[name][0]} already; give it "
        "another NAME=, or both as one folder or glob"
      )
    domains[name] = [source]
  return domains


def batches(
  sources: Sequence[str],
  tokenizer: Tokenizer,
  config: DataConfig,
  batch_size: int,
  num_rows: int,
) -> Iterator[Batch]:
  """The first rows of files, in windows of `data.seq_len` tokens.

  Args:
    sources: as in `data.sources`.
    tokenizer: the model's.
    config: of the model's data.
    batch_size: rows of a batch; what the last one lacks is padding.
    num_rows: at most so many.
  """
  count = -(-num_rows // batch_size)
  read = data.file_batches(sources, tokenizer, config, batch_size, count)
  for number, batch in enumerate(read):
    beyond = max(0, num_rows - number * batch_size)
    batch["segment_ids"][beyond:] = 0
    batch["loss_mask"][beyond:] = False
    yield batch


def require_text(
  domains: Domains, tokenizer: Tokenizer, config: DataConfig
) -> None:
  """Refuses text that fills not one window, before anything is computed.

  Raises:
    DataError: a domain is missing, unreadable or too short.
  """
  for name, sources in domains.items():
    tokens = 0
    for batch in data.file_batches(sources, tokenizer, config, 1):
      tokens += int((batch["segment_ids"] > 0).sum())
      if tokens >= config.seq_len:
        break
    else:
      raise DataError(
        f"domain {name} has {tokens} tokens, less than one window of "
        f"data.seq_len={config.seq_len}; give it more text"
      )
