# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole, proven by digests, or do not exist.

One folder a step:

  checkpoints/1000/
    arrays/params/ ...     Orbax, one item for each top-level key of the state
    meta.json              the caller's JSON: data position, config, versions
    manifest.json          size and digest of each file above; written last

`manifest.json` is the commit marker: a step without an intact one does not
exist. While a step is being written or deleted the file has the name
`manifest.json.tmp`, so that a crash at any moment leaves either a whole
checkpoint or a folder that says itself that it is none.
"""

from moejax.checkpoint.leaves import state_digest
from moejax.checkpoint.reader import CheckpointReader, Restored
from moejax.checkpoint.streaming import LeafReader, StepWriter
from moejax.checkpoint.writer import Checkpointer

__all__ = [
  "CheckpointReader", "Checkpointer", "LeafReader", "Restored", "StepWriter",
  "state_digest",
]  # fmt: skip
