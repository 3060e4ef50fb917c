# SPDX-License-Identifier: Apache-2.0
"""Each notebook runs from its first cell to its last, and stores no output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


@EACH
def test_it_is_stored_without_output(path):
  for cell in code_cells(path):
    assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@EACH
def test_it_runs(path, tmp_path):
  """In a process of its own, with nothing of the repository around it."""
  code = "\n".join("".join(cell["source"]) + "\n" for cell in code_cells(path))
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, text=True, timeout=600,
    capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
  if path.stem.startswith("04"):
    assert "all tensors equal: True" in done.stdout
