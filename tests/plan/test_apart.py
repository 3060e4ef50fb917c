# SPDX-License-Identifier: Apache-2.0
"""What a process of its own gives back, and how it may end."""

import math
import os

import pytest

from moejax.errors import ConfigError
from moejax.plan.apart import Crashed, run_apart


def test_results_and_errors_come_back():
  assert run_apart(math.gcd, 12, 18) == 6
  with pytest.raises(ConfigError, match="no such thing"):
    run_apart(_refuse, "no such thing")


def test_an_abort_is_not_ours():
  with pytest.raises(Crashed):
    run_apart(os.abort)


def _refuse(message):
  raise ConfigError(message)
