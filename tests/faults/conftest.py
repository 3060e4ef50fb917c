# SPDX-License-Identifier: Apache-2.0
"""A small run that nothing happened to, for runs that something does."""

import pytest

from tests.small_run import make_place
from tests.test_train import train


@pytest.fixture(scope="session")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def unbroken(place):
  done = train(place, "unbroken")
  assert done.returncode == 0, done.stderr
  return place / "unbroken"
