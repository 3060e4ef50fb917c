# SPDX-License-Identifier: Apache-2.0
"""A tiktoken vocabulary as tokenizer.json, without the code that comes with it.

The file has a line for each token, base64 and rank: byte-level BPE that always
merges the pair of lowest rank. The `tokenizers` library wants the pairs, which
follow from the ranks; how text is split first, and the special tokens, stand in
the checkpoint's own Python, so here they stand for the families that need them.
"""

import base64
import binascii
import dataclasses
import itertools
import json
from pathlib import Path

from moejax.convert.hub_tokenizer import spell_bytes
from moejax.errors import DataError

# How text is split; Hunyuan's, as Qwen's, takes digits one by one.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Dialect:
  """What a vocabulary file does not say.

  Attributes:
    pattern: of the pieces that text is cut into first.
    special: names of the special tokens by id.
  """

  pattern: str
  special: dict[int, str]


_HUNYUAN_NAMES = ("endoftext", "startoftext", "bos", "eos", "pad")
DIALECTS = {
  "hunyuan": Dialect(
    _SPLIT % r"\p{N}",
    {127957 + i: f"<|{name}|>" for i, name in enumerate(_HUNYUAN_NAMES)}
    | {127962 + i: f"<|extra_{i}|>" for i in range(204)},
  ),
  # OpenAI's cl100k_base, with DBRX's own tokens after it.
  "dbrx": Dialect(
    _SPLIT % r"\p{N}{1,3}",
    {
      100257: "<|endoftext|>", 100258: "<|fim_prefix|>",
      100259: "<|fim_middle|>", 100260: "<|fim_suffix|>",
      100276: "<|endofprompt|>", 100277: "<|pad|>", 100278: "<|im_start|>",
      100279: "<|im_end|>",
    },
  ),
}  # fmt: skip


def read_tiktoken(path: Path, dialect: Dialect) -> str:
  """The text of a tokenizer.json that gives the same ids.

  Raises:
    DataError: not such a file, or one whose ranks are not those of a BPE.
  """
  ranks = _read_ranks(path)
  if len(ranks) > min(dialect.special):
    raise DataError(
      f"{path} has {len(ranks)} ranks, special tokens begin at "
      f"{min(dialect.special)}: not the vocabulary of this family"
    )
  merges = []
  for token, rank in ranks.items():
    if len(token) == 1:
      continue
    pair = _last_pair(token, rank, ranks)
    if pair is None:
      raise DataError(f"{path}: rank {rank} is not made of two lower ones")
    merges.append([spell_bytes(part) for part in pair])
  return json.dumps(
    {
      "version": "1.0", "truncation": None, "padding": None,
      "added_tokens": _added_tokens(dialect, max(ranks.values()) + 1),
      "normalizer": None,
      "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
          {
            "type": "Split", "pattern": {"Regex": dialect.pattern},
            "behavior": "Isolated", "invert": False,
          },
          _byte_level(use_regex=False),
        ],
      },
      "post_processor": None,
      "decoder": _byte_level(use_regex=True),
      "model": {
        "type": "BPE", "dropout": None, "unk_token": None,
        "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False,
        # A piece that is a token is that token, however its bytes merge.
        "ignore_merges": True,
        "vocab": {spell_bytes(t): rank for t, rank in ranks.items()},
        "merges": merges,
      },
    },
    ensure_ascii=False,
  )  # fmt: skip


def _read_ranks(path: Path) -> dict[bytes, int]:
  """Tokens by rank, lowest first."""
  ranks = {}
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    if not line:
      continue
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
      raise DataError(f"{path}, line {number}: not base64 and a rank") from None
  ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
  if list(ranks.values()) != list(range(len(ranks))):
    raise DataError(f"{path}: ranks are not 0, 1, 2, ...")
  if missing := [b for b in range(256) if bytes([b]) not in ranks]:
    raise DataError(f"{path}: no token for byte {missing[0]}")
  return ranks


def _last_pair(
  token: bytes, limit: int, ranks: dict[bytes, int]
) -> tuple[bytes, bytes] | None:
  """What ranks below `limit` make of a token, if that is two parts."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 2:
    best = None
    for i, pair in enumerate(itertools.pairwise(parts)):
      joined = b"".join(pair)
      if joined in ranks and ranks[joined] < limit:
        if best is None or ranks[joined] < best[0]:
          best = ranks[joined], i
    if best is None:
      return None
    i = best[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  return parts[0], parts[1]


def _added_tokens(dialect: Dialect, first: int) -> list[dict]:
  """All ids from `first` on: the library closes holes, which moves ids."""
  names = {i: f"<|unused_{i}|>" for i in range(first, max(dialect.special))}
  return [
    {
      "id": number, "content": name, "special": True, "normalized": False,
      "single_word": False, "lstrip": False, "rstrip": False,
    }
    for number, name in sorted((names | dialect.special).items())
  ]  # fmt: skip


def _byte_level(use_regex: bool) -> dict:
  return {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
    "use_regex": use_regex,
  }  # fmt: skip
