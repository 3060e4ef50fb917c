# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: plain bytes, or any Hugging Face tokenizer.json.

A tokenizer is known by its digest, which token stores and checkpoints keep, so
that ids are never read with another tokenizer than the one that wrote them.
"""

import abc
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from moejax.errors import DataError
from moejax.files import write_atomically

FILE_NAME = "tokenizer.json"
BOS_NAMES = (
  "<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>",
  "<|beginoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
EOS_NAMES = (
  "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|eos|>",
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
PAD_NAMES = (
  "<pad>", "[PAD]", "<|padding|>", "<|pad|>", "<|finetune_right_pad_id|>",
  "<\uff5c\u2581pad\u2581\uff5c>",
)  # fmt: skip
_CHUNK = 1 << 20  # characters encoded at a time; bounds memory on huge texts


class Tokenizer(abc.ABC):
  """What the rest of moejax knows of a tokenizer.

  Attributes:
    name: short, for folder names and reports.
    vocab_size: ids are in [0, vocab_size).
    bos_id, pad_id: special ids, None where the tokenizer has none.
    eos_id: the id that ends each document.
    digest: SHA-256 (hex) of all that decides the ids.
  """

  name: str
  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int | None
  digest: str
  # Bytes that `encode` puts before a text: 1 where it begins with a space.
  invented_bytes: int = 0

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """[n] int32 ids of the text; never special ids, whatever it says."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids; special and unknown ids are left out."""

  @abc.abstractmethod
  def count_bytes(self, ids: np.ndarray) -> int:
    """UTF-8 bytes of the text of `ids`, of any shape; special ids have none."""

  @abc.abstractmethod
  def vocabulary(self) -> dict[str, int]:
    """The id of each entry."""

  @abc.abstractmethod
  def save(self, folder: str | os.PathLike) -> None:
    """Writes `tokenizer.json`, from which `load_tokenizer(folder)` reads."""

  def encode_document(self, text: str) -> np.ndarray:
    """[n] int32: bos (if the tokenizer has one), the text, eos."""
    bos = [] if self.bos_id is None else [self.bos_id]
    return np.concatenate(
      [
        np.array(bos, np.int32),
        self.encode(text),
        np.array([self.eos_id], np.int32),
      ]
    )

  def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
    """Text of the ids as it goes on after that of others.

    Alone it may lack its first space, which some tokenizers take for their own.
    """
    before = list(before)
    return self.decode([*before, *ids])[len(self.decode(before)) :]

  def stream_decoder(self, before: Iterable[int] = ()) -> "StreamDecoder":
    """Of ids that come one by one after others."""
    return StreamDecoder(self, before)


class ByteTokenizer(Tokenizer):
  """The 256 bytes of UTF-8, then pad, bos and eos."""

  name = "byte"
  vocab_size = 259
  pad_id = 256
  bos_id = 257
  eos_id = 258
  digest = hashlib.sha256(
    b"moejax byte tokenizer 1: 256 bytes, pad 256, bos 257, eos 258"
  ).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    data = text.encode("utf-8", "replace")
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    data = bytes(i for i in map(int, ids) if 0 <= i < 256)
    return data.decode("utf-8", "replace")

  def count_bytes(self, ids: np.ndarray) -> int:
    return int(((ids >= 0) & (ids < 256)).sum())

  def vocabulary(self) -> dict[str, int]:
    return {f"<0x{i:02X}>": i for i in range(256)}

  def save(self, folder: str | os.PathLike) -> None:
    text = json.dumps({"moejax_tokenizer": self.name}) + "\n"
    write_atomically(pathlib.Path(folder, FILE_NAME), text)


class FileTokenizer(Tokenizer):
  """A `tokenizer.json` read by the `tokenizers` library.

  Args:
    path: the file, for messages.
    text: its content.

  Raises:
    DataError: not a tokenizer, or one without an end-of-text token.
  """

  def __init__(self, path: pathlib.Path, text: str):
    # Threads inside the library fight with our own processes for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    try:
      canonical = json.dumps(json.loads(text), sort_keys=True)
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
      raise DataError(f"{path} is not a tokenizer.json: {e}") from None
    self._text = text
    self._configure()
    self.digest = hashlib.sha256(canonical.encode()).hexdigest()
    # Ids may have holes: what counts is the largest.
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    special = {
      token.content: number
      for number, token in self._tokenizer.get_added_tokens_decoder().items()
      if token.special
    }
    self.bos_id = _first(special, BOS_NAMES)
    self.pad_id = _first(special, PAD_NAMES)
    eos_id = _first(special, EOS_NAMES)
    if eos_id is None:
      raise DataError(
        f"{path} has no end-of-text token among its special tokens "
        f"({', '.join(sorted(special)) or 'none'}); add one of "
        f"{', '.join(EOS_NAMES)}"
      )
    self.eos_id = eos_id
    # Of its content alone: a run's copy of the file is the same tokenizer.
    self.name = f"v{self.vocab_size}"

  def _configure(self) -> None:
    # Text that spells a special token stays text, and nothing is ever cut.
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  def encode(self, text: str) -> np.ndarray:
    encode = self._tokenizer.encode_batch_fast
    return np.concatenate(
      [
        np.array(encode([chunk], add_special_tokens=False)[0].ids, np.int32)
        for chunk in _chunks(text)
      ]
    )

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

  def count_bytes(self, ids: np.ndarray) -> int:
    return int(self._byte_lengths[np.asarray(ids)].sum())

  @functools.cached_property
  def invented_bytes(self) -> int:
    ids = self.encode("x")
    # By a vocabulary of few letters it is not.
    known = self.decode(ids).lstrip(" ") == "x"
    return self.count_bytes(ids) - 1 if known else 0

  @functools.cached_property
  def _byte_lengths(self) -> np.ndarray:
    """[V] bytes of each entry."""
    lengths = np.zeros(self.vocab_size, np.int64)
    description = json.loads(self._text)
    # A byte-level vocabulary spells each byte as one character.
    byte_level = '"ByteLevel"' in json.dumps(description["decoder"])
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
    for entry, number in vocabulary.items():
      if re.fullmatch("<0x[0-9A-F]{2}>", entry):
        lengths[number] = 1
      else:
        text = entry.replace("\u2581", " ")
        lengths[number] = len(entry) if byte_level else len(text.encode())
    for number, token in self._tokenizer.get_added_tokens_decoder().items():
      lengths[number] = 0 if token.special else len(token.content.encode())
    return lengths

  def vocabulary(self) -> dict[str, int]:
    return self._tokenizer.get_vocab(with_added_tokens=True)

  def save(self, folder: str | os.PathLike) -> None:
    write_atomically(pathlib.Path(folder, FILE_NAME), self._text)

  def __getstate__(self) -> dict:
    left_out = ("_tokenizer", "_byte_lengths", "invented_bytes")
    return {k: v for k, v in self.__dict__.items() if k not in left_out}

  def __setstate__(self, state: dict) -> None:
    import tokenizers

    self.__dict__.update(state)
    self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
    self._configure()


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
  """The tokenizer of `byte`, a tokenizer.json, or a folder that holds one.

  Raises:
    DataError: the file is missing, unreadable, or not a usable tokenizer.
  """
  if spec == "byte":
    return ByteTokenizer()
  path = pathlib.Path(spec)
  if path.is_dir():
    path = path / FILE_NAME
  try:
    text = path.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise DataError(
      f"no tokenizer at {path}; name `byte` or a tokenizer.json, or run: "
      "moejax data train-tokenizer"
    ) from None
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"cannot read the tokenizer {path}: {e}") from None
  if text.startswith('{"moejax_tokenizer"'):
    return ByteTokenizer()
  return FileTokenizer(path, text)


class StreamDecoder:
  """Decodes ids as they are generated, never showing half a character.

  `push(id)` returns the text that became certain; `finish()` the rest.
  """

  _KEEP = 8  # ids of context, which some decoders need to place spaces
  _HELD = 3  # a UTF-8 character may lack this many bytes

  def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
    self._tokenizer = tokenizer
    self._ids = list(map(int, before))
    self._held = 0  # ids since the last whole character
    self._cut()

  def push(self, token_id: int) -> str:
    self._ids.append(int(token_id))
    text = self._tokenizer.decode(self._ids)
    whole = text
    if text.endswith("\ufffd"):
      # A decoder may take the characters before it for a part of it.
      self._held += 1
      if self._held <= self._HELD:
        return ""
      for _ in range(self._HELD):
        whole = whole.removesuffix("\ufffd")
    else:
      self._held = 0
    new = whole[self._shown :]
    self._shown = max(self._shown, len(whole))
    if whole == text and len(self._ids) > 4 * self._KEEP:
      self._cut()
    return new

  def _cut(self) -> None:
    """Leaves the last ids, from the beginning of a character on."""
    start = max(0, len(self._ids) - self._KEEP)
    decode = self._tokenizer.decode
    while start and decode(self._ids[start:]).startswith("\ufffd"):
      start -= 1
    self._ids = self._ids[start:]
    self._shown = len(decode(self._ids))

  def finish(self) -> str:
    text = self._tokenizer.decode(self._ids)[self._shown :]
    self._ids, self._shown, self._held = [], 0, 0
    return text


def train_tokenizer(
  texts: Iterable[str],
  vocab_size: int,
  output: str | os.PathLike,
) -> FileTokenizer:
  """Trains a byte-level BPE and writes it; equal texts give an equal file.

  Args:
    texts: documents.
    vocab_size: entries, with the 256 bytes and the 2 special tokens.
    output: a `.json` file, or a folder for `tokenizer.json`.

  Raises:
    DataError: no text, too small a vocabulary, or the output is unwritable.
  """
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  special = ["<|padding|>", "<|endoftext|>"]
  smallest = 256 + len(special)
  if vocab_size < smallest:
    raise DataError(f"vocab_size={vocab_size} is below {smallest}, the bytes")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=special,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  if tokenizer.get_vocab_size() <= smallest:
    raise DataError("the sources hold too little text to train a tokenizer on")
  path = pathlib.Path(output)
  if path.suffix != ".json":
    path = path / FILE_NAME
  text = tokenizer.to_str(pretty=True)
  partial = path.with_name(path.name + ".partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
  except OSError as e:
    raise DataError(f"cannot write {path}: {e.strerror}") from None
  return FileTokenizer(path, text)


def _first(special: dict[str, int], names: tuple[str, ...]) -> int | None:
  for name in names:
    if name in special:
      return special[name]
  return None


def _chunks(text: str) -> Iterator[str]:
  """Cuts a huge text after line ends; texts of ordinary size stay whole."""
  start = 0
  while len(text) - start > _CHUNK:
    end = text.rfind("\n", start + 1, start + _CHUNK) + 1 or start + _CHUNK
    yield text[start:end]
    start = end
  yield text[start:]
