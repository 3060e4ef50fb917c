# SPDX-License-Identifier: Apache-2.0
"""A run's tokenizer as transformers reads it."""

import json
from pathlib import Path

from moejax.data.tokenizer import ByteTokenizer, Tokenizer
from moejax.files import write_atomically

_SPECIAL = {256: "<pad>", 257: "<s>", 258: "</s>"}


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """Ids of the special tokens under the names of config.json."""
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": tokenizer.pad_id,
  }


def write_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
  """Writes tokenizer.json, its config and the ids that generation needs.

  Of the two latter only those that are not there: the hub's own say more.
  """
  if isinstance(tokenizer, ByteTokenizer):
    write_atomically(target / "tokenizer.json", byte_tokenizer_json())
  else:
    tokenizer.save(target)
  import tokenizers

  words = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
  ids = {k: i for k, i in special_ids(tokenizer).items() if i is not None}
  names = {k.removesuffix("_id"): words.id_to_token(i) for k, i in ids.items()}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
  for name, values in (
    ("tokenizer_config.json", config), ("generation_config.json", ids),
  ):  # fmt: skip
    if not (target / name).exists():
      _write_json(target / name, values)


def _spelling() -> dict[int, str]:
  """How the `tokenizers` library writes bytes: as printable characters.

  Those that are one stand for themselves, the others are the first ones from
  256 on.
  """
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  spelling = {byte: chr(byte) for byte in shown}
  others = [byte for byte in range(256) if byte not in spelling]
  return spelling | {byte: chr(256 + i) for i, byte in enumerate(others)}


_SPELLING = _spelling()


def spell_bytes(token: bytes) -> str:
  return "".join(_SPELLING[byte] for byte in token)


def byte_tokenizer_json() -> str:
  """The byte tokenizer in the `tokenizers` library's words: id = byte."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  vocabulary = {_SPELLING[byte]: byte for byte in range(256)}
  words = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  words.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  words.decoder = decoders.ByteLevel()
  for number, name in _SPECIAL.items():
    assert words.get_vocab_size() == number
    words.add_special_tokens([tokenizers.AddedToken(name, special=True)])
  return words.to_str(pretty=True)


def _write_json(path: Path, values: dict) -> None:
  write_atomically(path, json.dumps(values, indent=2) + "\n")
