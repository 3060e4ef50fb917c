# SPDX-License-Identifier: Apache-2.0
"""The folder of a run that never trained."""

import jax
import numpy as np

from moejax import runs
from moejax.checkpoint import StepWriter
from moejax.checkpoint.leaves import describe
from moejax.data.tokenizer import ByteTokenizer
from moejax.models import build, init_variables


def fresh_run(folder, config, variables=None):
  """A run of that config at step 3, with weights as they are drawn or these."""
  if variables is None:
    variables = init_variables(build(config.model), jax.random.key(0))
  names = describe(variables)
  writer = StepWriter(folder / "checkpoints", 3, names, "a test")
  for name, leaf in zip(names, jax.tree.leaves(variables), strict=True):
    writer.write(name, np.asarray(leaf))
  writer.commit({"step": 3, "tokenizer": ByteTokenizer.digest})
  runs.write_files(folder, config, ByteTokenizer())
  return folder
