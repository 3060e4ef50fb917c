# SPDX-License-Identifier: Apache-2.0
"""Files of a hub's folder: tensors read one at a time, and written so."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.convert.rules import Rule
from moejax.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What safetensors calls the dtypes that are read here.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What a tokenizer or a sampler needs; text and vocabularies, never code.
CARRIED = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
  "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class Tensors:
  """The tensors of a folder, read one at a time from memory-mapped files."""

  def __init__(self, files: Mapping[str, Any]):
    self._files = files

  def names(self) -> set[str]:
    return set(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Its name in numpy, or safetensors' own for one that is not read here."""
    found = self._files[name].get_slice(name).get_dtype()
    return DTYPES[found] if found in DTYPES else found

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
    return _indexed(folder, read_json(folder / INDEX))
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  pickles = [p.name for p in folder.glob("*.bin")]
  why = f"; {pickles[0]} is a pickle, which may run code" if pickles else ""
  raise DataError(f"{folder} holds no {SINGLE} and no {INDEX}{why}")


def _indexed(folder: Path, index: Mapping[str, Any]) -> list[Path]:
  if not isinstance(index.setdefault("weight_map", None), dict):
    raise DataError(f"{folder / INDEX} has no weight_map")
  named = sorted({str(name) for name in index["weight_map"].values()})
  for name in named:
    if os.path.basename(name) != name or name in ("", ".", ".."):
      raise DataError(f"{folder}: {INDEX} names {name!r}, not a file beside it")
    if not (folder / name).exists():
      raise DataError(f"{folder}: {INDEX} names {name}, which is missing")
  return [folder / name for name in named]


def source_digest(folder: Path, *options: str) -> str:
  """What a conversion of this folder depends on, without reading weights.

  Its config, the header, size and time of each file, and the options.
  """
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  for path in _shards(folder):
    stat = path.stat()
    digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as f:
      digest.update(f.read(int.from_bytes(f.read(8), "little")))
  digest.update(repr(options).encode())
  return digest.hexdigest()


def copy_carried(source: Path, target: Path) -> list[str]:
  """Copies what of `CARRIED` there is; returns the names."""
  found = [name for name in CARRIED if (source / name).is_file()]
  found += sorted(path.name for path in source.glob("*.tiktoken"))
  target.mkdir(parents=True, exist_ok=True)
  for name in found:
    shutil.copyfile(source / name, target / name)
  return found


def check_tensors(
  rules: Iterable[Rule], tensors: Tensors, ignored: str | None = None
) -> None:
  """Every tensor of the rules is there, of its shape, and none else.

  Names that begin with `ignored` may be there, which is said.

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
      if tensors.dtype(name) not in DTYPES.values():
        raise DataError(
          f"tensor {name} is {tensors.dtype(name)}; only "
          f"{', '.join(DTYPES.values())} are read, so dequantise it first"
        )
      unknown.remove(name)
  left_out = {n for n in unknown if ignored and n.startswith(ignored)}
  if left_out:
    print(f"note: {len(left_out)} tensors {ignored}* are left out")
  unknown -= left_out
  if unknown:
    raise DataError(
      f"{len(unknown)} tensors that this architecture does not have, such as "
      f"{min(unknown)}"
    )


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object of a file.

  Raises:
    DataError: missing, unreadable, or something else.
  """
  try:
    found = json.loads(path.read_text())
  except FileNotFoundError:
    raise DataError(f"{path} is missing") from None
  except (OSError, ValueError) as e:
    raise DataError(f"{path} is not readable: {e}") from e
  if not isinstance(found, dict):
    raise DataError(f"{path} is not readable: not a JSON object")
  return found


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor to be written."""

  name: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def write_safetensors(
  path: Path, entries: Sequence[Entry], arrays: Iterable[np.ndarray]
) -> None:
  """Writes one file, a tensor in memory at a time, whole or not at all.

  The library's own writer wants all tensors of the file at once, and copies
  them.

  Args:
    path: the file.
    entries: what it holds, in the order of `arrays`.
    arrays: one of each entry's shape and dtype.

  Raises:
    OSError: the disk refused.
  """
  partial = path.with_name(f"{path.name}.partial")
  with partial.open("wb") as f:
    f.write(safetensors_header(entries))
    for entry, array in zip(entries, arrays, strict=True):
      assert (array.shape, str(array.dtype)) == (entry.shape, entry.dtype)
      # As bytes: numpy's writer does not know bfloat16.
      f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())
  partial.replace(path)


def safetensors_header(entries: Sequence[Entry]) -> bytes:
  """The length and the JSON that a file of these tensors begins with."""
  names = {ours: theirs for theirs, ours in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for entry in entries:
    end = start + entry.num_bytes
    header[entry.name] = {
      "dtype": names[entry.dtype], "shape": list(entry.shape),
      "data_offsets": [start, end],
    }  # fmt: skip
    start = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text
