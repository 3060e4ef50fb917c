# SPDX-License-Identifier: Apache-2.0
"""Run folders for the report's tests."""

import pytest

from tests.report.synthetic import Recipe, write_run


@pytest.fixture
def make_run(tmp_path):
  """`make_run(name, **recipe)` -> folder."""
  return lambda name, **recipe: write_run(tmp_path / name, Recipe(**recipe))
