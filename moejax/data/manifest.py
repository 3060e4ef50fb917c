# SPDX-License-Identifier: Apache-2.0
"""The manifest of a token store, checked: a store may come from elsewhere."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from moejax.errors import DataError

FORMAT = 1
DATASET = "token_store"
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"

_LARGEST = 2**31 - 1


def shard_name(split: str, index: int, count: int) -> str:
  return f"{DATASET}-{split}.array_record-{index:05d}-of-{count:05d}"


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a finished store.

  Raises:
    DataError: missing, damaged, or written by another version of moejax.
  """
  path = folder / MANIFEST
  try:
    manifest = json.loads(path.read_text())
    found = manifest["format"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise DataError(
      f"{path} is missing or damaged ({e!r}); delete the folder and prepare "
      "again"
    ) from None
  if found != FORMAT:
    raise DataError(
      f"{folder} has format {found}, this moejax reads {FORMAT}; prepare it "
      "again"
    )
  if fault := find_fault(manifest):
    raise DataError(
      f"{path} is damaged: {fault}; delete the folder and prepare again"
    )
  return manifest


def find_fault(manifest: Mapping[str, Any]) -> str | None:
  """What a reader would trip over; None if there is nothing."""
  if fault := _first_fault(manifest, _STORE):
    return fault
  if "train" not in manifest["splits"]:
    return "it has no split train"
  for split, info in manifest["splits"].items():
    if split not in SPLITS or not isinstance(info, dict):
      return f"{split!r} is no split"
    if fault := _first_fault(info, _SPLIT):
      return f"{split}: {fault}"
    for index, shard in enumerate(info["shards"]):
      if not isinstance(shard, dict):
        return f"{split}: shard {index} is {shard!r}"
      if fault := _first_fault(shard, _SHARD):
        return f"{split}, shard {index}: {fault}"
      # No other name: it could lead out of the folder.
      name = shard_name(split, index, len(info["shards"]))
      if shard["name"] != name:
        return f"{split}, shard {index} is called {shard['name']!r}, not {name}"
    if sum(shard["rows"] for shard in info["shards"]) != info["rows"]:
      return f"the shards of {split} have not its {info['rows']} rows"
  return None


Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value


def _is_positive(value: Any) -> bool:
  return type(value) is int and 0 < value <= _LARGEST


def _is_digest(value: Any) -> bool:
  return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_share(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value <= 1


def _is(kind: type) -> Check:
  return lambda value: isinstance(value, kind)


_STORE: dict[str, Check] = {
  "source": _is(str),
  "tokenizer": _is_digest,
  "dtype": lambda value: value in ("<u2", "<u4"),
  "seq_len": _is_positive,
  "documents": _is_count,
  "tokens": _is_count,
  "replaced": _is_count,
  "empty_documents": _is_count,
  "splits": _is(dict),
}
_SPLIT: dict[str, Check] = {
  "rows": _is_count, "fill": _is_share, "shards": _is(list)
}  # fmt: skip
_SHARD: dict[str, Check] = {
  "name": _is(str), "rows": _is_count, "bytes": _is_count,
  "sha256": _is_digest, "rows_sha256": _is_digest,
}  # fmt: skip


def _first_fault(
  found: Mapping[str, Any], checks: Mapping[str, Check]
) -> str | None:
  for key, check in checks.items():
    if key not in found:
      return f"it has no {key}"
    if not check(found[key]):
      return f"{key} is {repr(found[key])[:80]}"
  return None
