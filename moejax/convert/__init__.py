# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints as models of ours, and back.

  config, variables = moejax.convert.load_hf("path/to/OLMoE-1B-7B")
  model = moejax.models.Transformer(config)
  moejax.convert.save_hf("path/to/new", config, variables, tokenizer)

`from_hf`, `to_hf` and `check` do the same from folder to folder, for weights
that do not fit into memory; they are what `moejax convert` calls, and so is
`upcycle`, which makes a mixture of experts of a dense run.
"""

from moejax.convert.check import check
from moejax.convert.from_hf import from_hf
from moejax.convert.load import load_hf
from moejax.convert.to_hf import save_hf, to_hf
from moejax.convert.upcycle import Recipe, upcycle

__all__ = [
  "Recipe", "check", "from_hf", "load_hf", "save_hf", "to_hf", "upcycle",
]  # fmt: skip
