# SPDX-License-Identifier: Apache-2.0
"""Options of the data."""

import dataclasses

from moejax.config.fields import (
  option,
  require,
  require_choice,
  require_positive,
)

LONGEST_ROW = 2**24  # a record of a token store is a message of protobuf


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from."""

  sources: tuple[str, ...] = option(
    ("python-stdlib",),
    "python-stdlib, a TFDS name as tfds:NAME, or a file, folder or glob of "
    ".txt .txt.gz .md .py .jsonl .jsonl.gz .parquet",
  )
  weights: tuple[float, ...] = option(
    (), "share of each source in the rows; empty: in proportion to their size"
  )
  text_key: str = option("text", "field that holds the text in records")
  tokenizer: str = option("byte", "byte, or the path of a tokenizer.json")
  store: str = option("token_store", "folder of the prepared token stores")
  seq_len: int = option(1024, "row length T in tokens")
  order: int = option(
    0, "another number shuffles the rows anew and begins with all of them"
  )
  exhausted: str = option(
    "repeat",
    "when a source has been read whole: repeat (again, in another order), "
    "reweight (the others share its part), or stop (refuse a run that would "
    "need more, and say which step is the last)",
  )
  validation_fraction: float = option(
    0.01, "share of documents, chosen by hash, that are never trained on"
  )
  num_workers: int = option(0, "reader processes; 0 reads in threads")
  prefetch_rows: int = option(256, "rows read ahead per worker")
  timeout: int = option(
    600,
    "seconds that a batch may take to come; then the run ends with one line, "
    "and goes on from its newest checkpoint",
  )

  def __post_init__(self):
    require(len(self.sources) > 0, "data.sources is empty; name one source")
    require(
      len(set(self.sources)) == len(self.sources),
      f"data.sources={self.sources} names a source twice; use data.weights",
    )
    if self.weights:
      require(
        len(self.weights) == len(self.sources),
        f"data.weights has {len(self.weights)} entries for "
        f"{len(self.sources)} data.sources; give one each",
      )
      require(
        all(w >= 0 for w in self.weights) and sum(self.weights) > 0,
        f"data.weights={self.weights} must be >= 0 and not all zero",
      )
    require_choice(
      "data.exhausted", self.exhausted, ("repeat", "reweight", "stop")
    )
    require_positive("data", self, "seq_len", "prefetch_rows", "timeout")
    require(
      self.seq_len <= LONGEST_ROW,
      f"data.seq_len={self.seq_len} is beyond {LONGEST_ROW}",
    )
    require(self.num_workers >= 0, "data.num_workers is negative")
    require(self.order >= 0, "data.order is negative")
    require(
      0 <= self.validation_fraction < 1,
      f"data.validation_fraction={self.validation_fraction} is not in [0, 1)",
    )
