# SPDX-License-Identifier: Apache-2.0
"""Folders as the hub has them, of tests/convert/families.py's models."""

import functools
import json
import string

from safetensors.numpy import save_file

from tests.convert import families as hf


def write(folder, family, tensors=None, shards=1, **changes):
  """Config, tensors in so many files, a tokenizer; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(tokenizer_json())
  (folder / "config.json").write_text(json.dumps(family.hf_config | changes))
  tensors = hf.tensors(family) if tensors is None else tensors
  if shards == 1:
    save_file(tensors, folder / "model.safetensors")
    return folder
  weight_map = {}
  for i in range(shards):
    name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = dict(list(tensors.items())[i::shards])
    save_file(part, folder / name)
    weight_map |= dict.fromkeys(part, name)
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": weight_map})
  )
  return folder


@functools.cache
def tokenizer_json():
  """Letters and digits as tokens: fewer than the models' vocabulary."""
  import tokenizers
  from tokenizers import decoders, models

  letters = string.ascii_lowercase + " ,.:-?!'\n" + string.digits
  vocabulary = {c: i for i, c in enumerate(["<unk>", *letters])}
  words = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
  words.decoder = decoders.Fuse()
  words.add_special_tokens(
    [tokenizers.AddedToken("<|endoftext|>", special=True)]
  )
  assert words.get_vocab_size() < hf.V
  return words.to_str()
