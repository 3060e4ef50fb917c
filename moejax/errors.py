# SPDX-License-Identifier: Apache-2.0
"""The errors a person can act on; commands print them as one line."""


class UserError(Exception):
  """Something outside the code is wrong: says what, and what to do."""


class ConfigError(UserError, ValueError):
  """A config that cannot run; the message names the key and the fix."""


class DataError(UserError):
  """Missing, empty, unreadable or damaged data."""


class CheckpointError(UserError):
  """A checkpoint that is damaged or does not fit."""


class StuckError(UserError):
  """What does not end; its threads would also keep a process alive."""
