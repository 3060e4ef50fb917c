# SPDX-License-Identifier: Apache-2.0
"""Each notebook runs from its first cell to its last, and stores no output."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
SAYS = {
  "01_train_tiny": ["validation loss", "def "],
  "02_swap_a_router": ["experts from 3 to ", "but there are 8, from 0 to 7"],
  "03_look_at_routing": ["step 200"],
  "04_load_published_weights": ["all tensors equal: True"],
  "05_plan_a_pod": ["B parameters"],
}
PICTURES = {
  "01_train_tiny": 1, "02_swap_a_router": 1, "03_look_at_routing": 4,
  "04_load_published_weights": 1, "05_plan_a_pod": 0,
}  # fmt: skip


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


@EACH
def test_it_is_stored_without_output(path):
  for cell in code_cells(path):
    assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@EACH
def test_it_runs(path, tmp_path, monkeypatch):
  """In a kernel of its own, with nothing of the repository around it."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.delenv("MPLBACKEND")  # pictures stand in the notebook
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute()  # raises what a cell raises
  printed, pictures = "", 0
  for cell in notebook.cells:
    for output in cell["outputs"] if cell.cell_type == "code" else ():
      printed += output["text"] if output.output_type == "stream" else ""
      pictures += "image/png" in output["data"] if "data" in output else 0
  for said in SAYS[path.stem]:
    assert said in printed, printed
  assert pictures == PICTURES[path.stem]
