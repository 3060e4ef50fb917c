# SPDX-License-Identifier: Apache-2.0
"""Tokens and compute of a run, phase by phase."""

from moejax.config import Config, phases_of
from moejax.models import train_flops_per_token


def tokens_and_flops(config: Config) -> tuple[int, float]:
  """D, the tokens of all batches, and C, by the config's own count.

  Phases may have rows of another length, which cost more or less a token, and
  batches of another size.
  """
  tokens, flops = 0, 0.0
  for phase in phases_of(config):
    length = phase.config.data.seq_len
    steps = phase.end - phase.start
    own = steps * phase.config.train.batch_size * length
    tokens += own
    flops += own * train_flops_per_token(phase.config.model, length)
  return tokens, flops


def row_lengths(config: Config) -> list[int]:
  """Lengths of the rows that there are in the run, shortest first."""
  return sorted({phase.config.data.seq_len for phase in phases_of(config)})
