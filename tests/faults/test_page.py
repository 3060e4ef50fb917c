# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md names each row of the matrix, and tests that exist."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_all_rows_are_there():
  rows = [int(n) for n in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)]
  assert rows == list(range(1, 58))


def test_the_tests_it_names_exist():
  named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
  assert len(named) > 60
  for path, name in named:
    tree = ast.parse((ROOT / path).read_text())
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert name in functions, f"{path}::{name}"


def test_every_test_of_a_fault_is_named():
  """Each one, not one of each file."""
  named = {*re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)}
  tests = {
    (path.relative_to(ROOT).as_posix(), node.name)
    for path in (ROOT / "tests" / "faults").glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
  }
  missing = {test for test in tests if "test_page.py" not in test[0]} - named
  assert len(tests) > 40 and not missing, sorted(missing)
