# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: round trips, special tokens, streaming, training."""

import json
import pickle

import numpy as np
import pytest

from moejax.data.tokenizer import (
  ByteTokenizer,
  load_tokenizer,
  train_tokenizer,
)
from moejax.errors import DataError
from moejax.evaluate import count_bytes

TEXTS = (
  "plain text\nwith lines\n",
  "naïve café, 中文, עברית, 👩‍👩‍👧 and \u0000 NUL",
  "  spaces\tand\r\nline ends  ",
  "<|endoftext|> </s> <s> <|padding|>",
)
CORPUS = [f"def f{i}(x):\n  return x + {i}  # café 中\n" for i in range(300)]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  train_tokenizer(CORPUS, 400, path)
  return path


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe_file):
  return load_tokenizer("byte" if request.param == "byte" else bpe_file)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_text_never_becomes_special_tokens(tokenizer):
  special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  ids = tokenizer.encode("a<|endoftext|>b<|padding|><s></s>")
  assert not special.intersection(ids.tolist())


def test_documents_end_with_eos_and_begin_with_bos_if_there_is_one(tokenizer):
  ids = tokenizer.encode_document("ab")
  assert ids[-1] == tokenizer.eos_id
  assert tokenizer.decode(ids) == "ab"
  first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  assert ids[: len(first)].tolist() == first
  assert np.array_equal(ids[len(first) : -1], tokenizer.encode("ab"))


def test_bytes_of_ids_are_the_bytes_of_the_text(tokenizer):
  for text in TEXTS:
    ids = tokenizer.encode_document(text)
    assert tokenizer.count_bytes(ids) == len(text.encode())


def test_streaming_shows_whole_characters_and_all_of_the_text(tokenizer):
  text = "".join(TEXTS) * 5
  stream = tokenizer.stream_decoder()
  shown = [stream.push(i) for i in tokenizer.encode(text)]
  assert "\ufffd" not in "".join(shown)
  assert "".join(shown) + stream.finish() == text


@pytest.fixture(scope="module")
def llama_style(tmp_path_factory):
  """A space before each text, which the decoder takes away again."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, trainers

  words = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
  words.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  words.decoder = decoders.Sequence([
    decoders.Replace("\u2581", " "), decoders.ByteFallback(),
    decoders.Fuse(), decoders.Strip(" ", 1, 0),
  ])  # fmt: skip
  trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False
  )
  words.train_from_iterator(["the quick brown fox jumps over"] * 20, trainer)
  content = json.loads(words.to_str())
  ids = content["model"]["vocab"]
  ids |= {f"<0x{i:02X}>": len(ids) + i for i in range(256)}
  path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
  path.write_text(json.dumps(content))
  return load_tokenizer(path)


def test_what_goes_on_after_a_prompt_keeps_its_first_space(llama_style):
  before, after = (
    llama_style.encode(text).tolist() for text in ("the", "brown fox")
  )
  assert llama_style.decode(after) == "brown fox"
  assert llama_style.decode_after(before, after) == " brown fox"
  stream = llama_style.stream_decoder(before)
  shown = "".join(map(stream.push, after)) + stream.finish()
  assert shown == " brown fox"
  long = llama_style.encode("the quick brown fox " * 9).tolist()
  stream = llama_style.stream_decoder(long)
  shown = "".join(map(stream.push, after)) + stream.finish()
  assert shown == llama_style.decode_after(long, after) == " brown fox"


def test_characters_of_byte_tokens_are_streamed_whole(llama_style):
  """They are in no vocabulary of theirs, and run into those of the prompt."""
  for prompt, after in (
    ("x\u4f60\u597d\u5417", "\u4f60 x"),
    ("the", "\u4f60\u597d\u5417 \U0001f469\u597d"),
    ("\U0001f469" * 9, "\u597d"),
  ):
    before, whole = (
      llama_style.encode(text).tolist() for text in (prompt, prompt + after)
    )
    assert whole[: len(before)] == before
    stream = llama_style.stream_decoder(before)
    shown = [stream.push(i) for i in whole[len(before) :]]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + stream.finish() == after


def test_a_space_that_was_invented_is_no_byte_of_the_text(
  llama_style, bpe_file, tmp_path
):
  """Of two texts in a row, the first of which begins with it as a target."""
  assert llama_style.invented_bytes == 1
  assert pickle.loads(pickle.dumps(llama_style)).invented_bytes == 1
  level = json.loads(bpe_file.read_text())
  level["pre_tokenizer"]["add_prefix_space"] = True
  (tmp_path / "tokenizer.json").write_text(json.dumps(level))
  assert load_tokenizer(tmp_path).invented_bytes == 1
  assert load_tokenizer(bpe_file).invented_bytes == 0
  texts = ["the fox", "brown", ""]
  ids = np.concatenate([llama_style.encode_document(t) for t in texts])
  batch = {"tokens": ids[None, :-1], "targets": ids[None, 1:]}
  mask = np.ones(batch["tokens"].shape, bool)
  found = count_bytes(batch, mask, llama_style)
  assert found == sum(map(len, texts))
  mask[0, 0] = False  # then it is no target, nor is the letters' token
  first = llama_style.count_bytes(batch["targets"][0, :1]) - 1
  assert count_bytes(batch, mask, llama_style) == found - first


def test_deepseeks_names_of_special_tokens(bpe_file, tmp_path):
  content = json.loads(bpe_file.read_text())
  names = ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence")
  for token, name in zip(content["added_tokens"], names, strict=True):
    token["content"] = f"<\uff5c{name}\uff5c>"
    content["model"]["vocab"][token["content"]] = token["id"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  words = load_tokenizer(tmp_path)
  ids = [token["id"] for token in content["added_tokens"]]
  assert [words.bos_id, words.eos_id] == ids


def test_streaming_shows_a_broken_character_at_last():
  stream = ByteTokenizer().stream_decoder()
  first, *rest = "é".encode()
  assert [stream.push(first), stream.push(ord("x"))] == ["", "\ufffdx"]
  assert stream.push(first) == "" and stream.push(rest[0]) == "é"
  assert stream.push(first) == "" and stream.finish() == "\ufffd"
  # Continuation bytes alone do not hold the text back for ever.
  assert "\ufffd" in "".join(stream.push(0x80) for _ in range(20))


def test_byte_ids():
  tokenizer = load_tokenizer("byte")
  assert tokenizer.pad_id == 256
  assert (tokenizer.bos_id, tokenizer.eos_id) == (257, 258)
  assert tokenizer.vocab_size == 259
  assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
  assert tokenizer.decode([257, 97, 300, -1, 258]) == "a"


def test_saving_and_loading_keeps_ids_and_digest(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert loaded.digest == tokenizer.digest
  assert np.array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))
  again = pickle.loads(pickle.dumps(tokenizer))
  text = TEXTS[3]
  assert np.array_equal(again.encode(text), tokenizer.encode(text))
  assert again.count_bytes(again.encode(text)) == len(text.encode())


def test_the_digest_follows_the_content_not_the_layout(bpe_file, tmp_path):
  content = json.loads(bpe_file.read_text())
  other = tmp_path / "other.json"
  other.write_text(json.dumps(content))
  assert load_tokenizer(other).digest == load_tokenizer(bpe_file).digest
  content["model"]["merges"].pop()
  other.write_text(json.dumps(content))
  assert load_tokenizer(other).digest != load_tokenizer(bpe_file).digest


def test_training_is_deterministic_and_compresses(bpe_file, tmp_path):
  train_tokenizer(iter(CORPUS), 400, tmp_path / "again")
  again = tmp_path / "again" / "tokenizer.json"
  assert again.read_bytes() == bpe_file.read_bytes()
  tokenizer = load_tokenizer(again)
  assert tokenizer.vocab_size == 400
  text = CORPUS[7]
  assert len(tokenizer.encode(text)) < len(text.encode()) / 2


def test_a_huge_text_is_encoded_in_chunks_without_loss(bpe_file, monkeypatch):
  monkeypatch.setattr("moejax.data.tokenizer._CHUNK", 100)
  tokenizer = load_tokenizer(bpe_file)
  text = "".join(CORPUS)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode(tokenizer.encode("x" * 1234)) == "x" * 1234


def test_truncation_in_the_file_is_switched_off(bpe_file, tmp_path):
  content = json.loads(bpe_file.read_text())
  content["truncation"] = {
    "direction": "Right", "max_length": 4, "strategy": "LongestFirst",
    "stride": 0,
  }  # fmt: skip
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  text = CORPUS[0]
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unusable_tokenizers_are_named(bpe_file, tmp_path):
  with pytest.raises(DataError, match=r"no tokenizer at .*missing.json"):
    load_tokenizer(tmp_path / "missing.json")
  broken = tmp_path / "broken.json"
  broken.write_text("{")
  with pytest.raises(DataError, match=r"broken.json is not a tokenizer"):
    load_tokenizer(broken)
  content = json.loads(bpe_file.read_text())
  content["added_tokens"] = []
  broken.write_text(json.dumps(content))
  with pytest.raises(DataError, match="no end-of-text token"):
    load_tokenizer(broken)
  with pytest.raises(DataError, match="below 258"):
    train_tokenizer(CORPUS, 100, tmp_path)
  with pytest.raises(DataError, match="too little text"):
    train_tokenizer([], 400, tmp_path)


def test_the_olmo_tokenizer(shared_data):
  path = shared_data / "tokenizer" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
  tokenizer = load_tokenizer(path)
  assert (tokenizer.eos_id, tokenizer.pad_id) == (50279, 1)
  assert tokenizer.bos_id is None
  assert tokenizer.vocab_size == 50280
  text = "The quick brown fox\n    indented  twice, naïve 中文 <|endoftext|>"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert 50279 not in ids
  assert tokenizer.count_bytes(ids) == len(text.encode())
