# SPDX-License-Identifier: Apache-2.0
"""Corpora, and stores prepared of them, for the tests of `moejax.data`."""

import hashlib
import json
import pathlib

import numpy as np

from moejax.config import DataConfig
from moejax.data import StoreSet, load_tokenizer, open_stores, prepare

WORDS = ("expert", "router", "token", "gate", "naïve", "中文", "load", "mesh")


def quiet(line: str) -> None:
  """For `say`."""


def write_corpus(folder: pathlib.Path, documents: int, seed: int = 0) -> None:
  """A .jsonl of random documents of very different length."""
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "data.jsonl", "w") as f:
    for _ in range(documents):
      count = int(rng.lognormal(3.0, 1.2)) + 1
      text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), count))
      f.write(json.dumps({"text": text}) + "\n")


def make_stores(
  folder: pathlib.Path, sizes: tuple[int, ...], **options
) -> tuple[DataConfig, StoreSet]:
  """Prepared and opened stores of one corpus a size."""
  specs = []
  for number, size in enumerate(sizes):
    write_corpus(folder / f"corpus{number}", size, number)
    specs.append(str(folder / f"corpus{number}"))
  options = {"seq_len": 32, "validation_fraction": 0.1} | options
  config = DataConfig(
    sources=tuple(specs), store=str(folder / "store"), **options
  )
  prepare(config, say=quiet)
  return config, open_stores(config, load_tokenizer(config.tokenizer))


def contents(folder: pathlib.Path) -> dict[str, str]:
  """Digest of each file of a store, but for what is only remembered."""
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.iterdir()
    if path.name != "verified.json"
  }
