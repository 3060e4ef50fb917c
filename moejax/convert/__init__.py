# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints as models of ours.

from moejax.convert import load_hf

config, variables = load_hf("path/to/OLMoE-1B-7B")
model = moejax.models.build(config)
"""

from moejax.convert.load import load_hf

__all__ = ["load_hf"]
