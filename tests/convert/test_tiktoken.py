# SPDX-License-Identifier: Apache-2.0
"""tiktoken's vocabularies, against tiktoken."""

import base64
import itertools
import json

import pytest

from moejax.convert.hub_tokenizer import spell_bytes
from moejax.convert.tiktoken import DIALECTS, Dialect, read_tiktoken
from moejax.data.tokenizer import load_tokenizer, train_tokenizer
from moejax.errors import DataError

TEXTS = (
  "The quick brown fox doesn't jump, WE'LL see: it'd 've 12 1234567 times!",
  "def f(x):\n\n\n    return x  ** 2   # squares\r\n\t\tpass\n",
  "naïve café, Straße, 漢字かな交じり文, Привет мир, नमस्ते, 🙂👩‍👩‍👧 e\u0301",
  "   leading and trailing   ", "\n\n \n", "a", "", "<|endoftext|> <|pad|>",
  "http://example.com/?q=1&r=2#x", "ｆｕｌｌｗｉｄｔｈ １２３ ²³½",
)  # fmt: skip


def ranks_of(tmp_path):
  """Ranks of a BPE trained here, in bytes."""
  texts = [text for text in TEXTS for _ in range(4)] * 3
  words = train_tokenizer(texts, 600, tmp_path / "trained.json")
  words.save(tmp_path)
  model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
  letters = {spell_bytes(bytes([b])): b for b in range(256)}
  as_bytes = lambda text: bytes(letters[c] for c in text)
  tokens = [bytes([b]) for b in range(256)]
  for pair in model["merges"]:
    pair = pair.split(" ") if isinstance(pair, str) else pair
    joined = as_bytes("".join(pair))
    if joined not in tokens:
      tokens.append(joined)
  return {token: rank for rank, token in enumerate(tokens)}


def write(path, ranks):
  lines = [
    base64.b64encode(token) + b" " + str(rank).encode()
    for token, rank in ranks.items()
  ]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


@pytest.mark.parametrize("name", DIALECTS)
def test_ids_are_tiktokens(name, tmp_path):
  tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not here")
  ranks = ranks_of(tmp_path)
  # Special tokens keep their distances, holes included.
  first = min(DIALECTS[name].special)
  special = {
    i - first + len(ranks) + 1: s for i, s in DIALECTS[name].special.items()
  }
  dialect = Dialect(DIALECTS[name].pattern, special)
  theirs = tiktoken.Encoding(
    name, pat_str=dialect.pattern, mergeable_ranks=ranks,
    special_tokens={name: i for i, name in special.items()},
  )  # fmt: skip
  (tmp_path / "made").mkdir()
  (tmp_path / "made/tokenizer.json").write_text(
    read_tiktoken(write(tmp_path / "x.tiktoken", ranks), dialect)
  )
  ours = load_tokenizer(tmp_path / "made")
  assert ours.eos_id == len(ranks) + 1 and ours.pad_id is not None
  assert ours.vocab_size == theirs.n_vocab
  for text in TEXTS:
    ids = theirs.encode(text, disallowed_special=())
    assert ours.encode(text).tolist() == ids, text
    assert ours.decode(ids) == text
    assert ours.count_bytes(ours.encode(text)) == len(text.encode())


def test_merges_follow_from_ranks(tmp_path):
  ranks = {bytes([b]): b for b in range(256)}
  ranks |= {b"ab": 256, b"bc": 257, b"abc": 258, b"abcd": 259}
  text = read_tiktoken(write(tmp_path / "x", ranks), DIALECTS["hunyuan"])
  merges = json.loads(text)["model"]["merges"]
  assert merges == [["a", "b"], ["b", "c"], ["ab", "c"], ["abc", "d"]]


def test_what_is_no_vocabulary(tmp_path):
  ranks = {bytes([b]): b for b in range(256)}
  read = lambda ranks: read_tiktoken(
    write(tmp_path / "x", ranks), DIALECTS["dbrx"]
  )
  with pytest.raises(DataError, match="rank 256 is not made of two lower"):
    read(ranks | {b"abc": 256})
  with pytest.raises(DataError, match="ranks are not 0, 1, 2"):
    read(ranks | {b"ab": 257})
  ranks[b"ab"] = ranks.pop(b"\x07")
  with pytest.raises(DataError, match="no token for byte 7"):
    read(ranks)
  (tmp_path / "x").write_text("no ranks here\n")
  with pytest.raises(DataError, match="line 1: not base64 and a rank"):
    read_tiktoken(tmp_path / "x", DIALECTS["dbrx"])


def test_a_folder_with_a_vocabulary_alone(tmp_path):
  """DBRX, with ids and embedding as large as published."""
  from moejax.convert.from_hf import read_tokenizer

  tokens = [bytes([b]) for b in range(256)]
  tokens += [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
  tokens += [pair + b"a" for pair in tokens[256 : 100256 - len(tokens) + 256]]
  ranks = {token: rank for rank, token in enumerate(tokens)}
  assert len(ranks) == 100256  # as cl100k_base has
  write(tmp_path / "cl100k_base.tiktoken", ranks)
  (tmp_path / "config.json").write_text('{"model_type": "dbrx"}')
  words = read_tokenizer(tmp_path)
  assert (words.eos_id, words.pad_id) == (100257, 100277)
  assert words.vocab_size == 100280 <= 100352
  assert words.encode("ab").tolist() == [ranks[b"ab"]]
  write(
    tmp_path / "cl100k_base.tiktoken",
    ranks | {b"abcd": 100256, b"abce": 100257, b"abcf": 100258},
  )
  with pytest.raises(DataError, match="100259 ranks, special tokens begin at"):
    read_tokenizer(tmp_path)
