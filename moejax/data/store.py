# SPDX-License-Identifier: Apache-2.0
"""A token store: packed rows on disk, read by index.

A store is a folder: ArrayRecord shards that TFDS reads as a dataset too
(`tfds.builder_from_directory(folder).as_data_source("train")`, no TensorFlow),
`manifest.json` with what it was made of and each shard's SHA-256, the
tokenizer, and `sources.json` with the digest of each source file. A record has
two fields: `tokens` [T+1] and `segment_ids` [T+1]; see `packing.py`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any, Self

import numpy as np

from moejax import storage
from moejax.config import DataConfig
from moejax.data import sources
from moejax.data.manifest import DATASET, FORMAT, MANIFEST, read_manifest
from moejax.data.packing import Row
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError
from moejax.files import cache_folder

VERIFIED = "verified.json"
_THREADS = 4
_REMEDY = (
  "put the file back, or make the store anew: moejax data prepare --rebuild ..."
)


def store_path(
  config: DataConfig, spec: str, tokenizer: Tokenizer
) -> pathlib.Path:
  """The folder of the store of one source; anything that matters changes it.

  Of a store at an address, that of its copy here.
  """
  key = store_key(config, spec, tokenizer)
  digest = sources.text_digest(json.dumps(key, sort_keys=True))
  name = f"{sources.slug(spec)}-{tokenizer.name}-T{config.seq_len}-{digest[:8]}"
  if found := storage.address(config.store):
    digest = sources.text_digest(found)[:16]
    return cache_folder("token_stores") / digest / name
  return pathlib.Path(config.store) / name


def store_key(
  config: DataConfig, spec: str, tokenizer: Tokenizer
) -> dict[str, Any]:
  """What tells one store from another, apart from the source's content."""
  return {
    "format": FORMAT,
    "source": sources.identity(spec),
    "text_key": config.text_key,
    "tokenizer": tokenizer.digest,
    "seq_len": config.seq_len,
    "validation_fraction": config.validation_fraction,
  }


def token_dtype(vocab_size: int) -> np.dtype:
  """The dtype that tokens are stored in."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_row(row: Row) -> bytes:
  """A row as a record: a tf.Example with the raw bytes of both arrays."""
  example = _example_class()()
  feature = example.features.feature
  feature["tokens"].bytes_list.value.append(row.tokens.tobytes())
  feature["segment_ids"].bytes_list.value.append(row.segment_ids.tobytes())
  return example.SerializeToString(deterministic=True)


@functools.cache
def _example_class() -> Any:
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example


def write_metadata(
  folder: pathlib.Path, seq_len: int, dtype: np.dtype, manifest: dict[str, Any]
) -> None:
  """Writes what TFDS needs to read the folder."""
  import tensorflow_datasets as tfds

  features = tfds.features

  def array(dtype: np.dtype) -> features.Tensor:
    return features.Tensor(
      shape=(seq_len + 1,), dtype=np.dtype(dtype).type,
      encoding=features.Encoding.BYTES,
    )  # fmt: skip

  infos = []
  for split, info in manifest["splits"].items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=DATASET, split=split,
      filetype_suffix="array_record",
    )  # fmt: skip
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard["rows"] for shard in info["shards"]],
        num_bytes=sum(shard["bytes"] for shard in info["shards"]),
        filename_template=template,
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features.FeaturesDict(
      {"tokens": array(dtype), "segment_ids": array(np.dtype("<u2"))}
    ),
    split_infos=infos,
    description="Rows of tokens, packed by moejax.",
    check_data=False,
  )


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """An opened store; picklable, so that reader processes can have it.

  Attributes:
    folder: where it lies.
    manifest: the content of manifest.json.
  """

  folder: pathlib.Path
  manifest: dict[str, Any]

  @classmethod
  def open(cls, folder: pathlib.Path, tokenizer: Tokenizer) -> Self:
    """Opens a store and checks it.

    Raises:
      DataError: another tokenizer wrote it, or a shard is missing, truncated or
        damaged; names the shard.
    """
    manifest = read_manifest(folder)
    if manifest["tokenizer"] != tokenizer.digest:
      raise DataError(
        f"{folder} holds tokens of another tokenizer: sha256 "
        f"{manifest['tokenizer'][:12]} there, {tokenizer.digest[:12]} here"
      )
    store = cls(folder, manifest)
    store.verify()
    return store

  @property
  def seq_len(self) -> int:
    return self.manifest["seq_len"]

  @property
  def source(self) -> str:
    return self.manifest["source"]

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(self.manifest["dtype"])

  @property
  def fingerprint(self) -> str:
    """SHA-256 over the content of all rows, however the files compress it."""
    content = [self.manifest[name] for name in ("format", "tokenizer", "dtype")]
    content += [
      [split, shard["rows_sha256"]]
      for split in self.manifest["splits"]
      for shard in self.shards(split)
    ]
    return sources.text_digest(json.dumps(content))

  def warm_up(self) -> None:
    """Imports what reading needs, so that threads do not do it at once."""
    _example_class()
    assert self._readers

  def rows(self, split: str) -> int:
    splits = self.manifest["splits"]
    return splits[split]["rows"] if split in splits else 0

  def shards(self, split: str) -> list[dict[str, Any]]:
    return self.manifest["splits"][split]["shards"]

  def read(self, split: str, row: int) -> Row:
    """Row number `row` of a split.

    Raises:
      DataError: the record is damaged; names the shard and the row.
    """
    try:
      record = self._readers[split][row]
      feature = _example_class().FromString(record).features.feature
      found = Row(
        np.frombuffer(feature["tokens"].bytes_list.value[0], self.dtype),
        np.frombuffer(feature["segment_ids"].bytes_list.value[0], "<u2"),
      )
      lengths = {len(found.tokens), len(found.segment_ids)}
      if lengths != {self.seq_len + 1}:
        raise ValueError(f"of lengths {lengths}")
    except Exception as e:  # array_record and protobuf share no base
      raise DataError(
        f"{self._shard_of(split, row)}: row {row} is unreadable "
        f"({str(e).splitlines()[0] if str(e) else type(e).__name__}); put the "
        "file back, or delete the store and prepare again"
      ) from None
    return found

  def verify(self) -> None:
    """Checks sizes always, and each shard's SHA-256 once after it changed.

    What was checked is remembered beside the shards, by size, time of change
    and inode; in a folder that cannot be written it is checked each time.
    """
    expected = {
      shard["name"]: shard
      for split in self.manifest["splits"]
      for shard in self.shards(split)
    }
    seen = {}
    for name, shard in expected.items():
      seen[name] = self._check_size(name, shard["bytes"])
    known = read_verified(self.folder)["shards"]
    unchecked = [n for n in expected if n not in known or known[n] != seen[n]]
    if not unchecked:
      return
    paths = [self.folder / name for name in unchecked]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for name, digest in zip(unchecked, pool.map(_digest_or_none, paths)):
        if digest != expected[name]["sha256"]:
          raise DataError(
            f"{self.folder / name} is damaged: its SHA-256 is not the one in "
            f"{MANIFEST}; {_REMEDY}"
          )
    remember_verified(self.folder, shards=seen)

  def _check_size(self, name: str, expected: int) -> list[int]:
    try:
      stat = (self.folder / name).stat()
    except OSError as e:
      raise DataError(
        f"{self.folder / name}: {e.strerror}; {_REMEDY}"
      ) from None
    if stat.st_size != expected:
      raise DataError(
        f"{self.folder / name} has {stat.st_size} bytes instead of {expected}; "
        f"{_REMEDY}"
      )
    return file_state(stat)

  @functools.cached_property
  def _readers(self) -> dict[str, Any]:
    """By split; they open a shard when it is first read."""
    from array_record.python import array_record_data_source

    return {
      split: array_record_data_source.ArrayRecordDataSource(
        [
          _Instruction(str(self.folder / shard["name"]), shard["rows"])
          for shard in info["shards"]
          if shard["rows"]
        ]
      )
      for split, info in self.manifest["splits"].items()
    }

  def _shard_of(self, split: str, row: int) -> pathlib.Path:
    for shard in self.shards(split):
      if row < shard["rows"]:
        return self.folder / shard["name"]
      row -= shard["rows"]
    raise IndexError(f"row {row} is beyond the last of {self.folder}")


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """A whole shard, in the form that spares array_record from opening it."""

  filename: str
  take: int
  skip: int = 0

  @property
  def examples_in_shard(self) -> int:
    return self.take


def file_state(stat: os.stat_result) -> list[int]:
  """What changes when a file is written again or copied."""
  return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def read_verified(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """What is remembered of checked files: `shards` and `sources`, by name."""
  try:
    known = json.loads((folder / VERIFIED).read_text())
    return {"shards": dict(known["shards"]), "sources": dict(known["sources"])}
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return {"shards": {}, "sources": {}}  # only a memory; all is checked again


def remember_verified(folder: pathlib.Path, **changes: dict[str, Any]) -> None:
  known = read_verified(folder) | changes
  partial = folder / f"{VERIFIED}.{os.getpid()}.partial"
  try:
    partial.write_text(json.dumps(known, sort_keys=True))
    os.replace(partial, folder / VERIFIED)
  except OSError:
    return  # a read-only store is checked each time


def _digest_or_none(path: pathlib.Path) -> str | None:
  try:
    return sources.file_digest(path)
  except OSError:
    return None
