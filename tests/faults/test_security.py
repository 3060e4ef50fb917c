# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read from a run, a store or a hub's folder runs code."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from moejax.convert import load_hf
from moejax.errors import DataError
from tests.convert import families
from tests.convert.hub_folder import write
from tests.small_run import environment
from tests.test_train import train


def test_a_router_of_ones_own_is_found_where_python_looks(place, tmp_path):
  (place / "mine.py").write_text(
    "from moejax.routing import top_k\n"
    "def worst(logits_TE, mask_T, *, k, rng=None):\n"
    "  return top_k(-logits_TE, mask_T, k=k)\n"
  )
  done = train(
    place, "mine", "--config.model.moe.router=mine.worst(k=1)",
    "--config.train.num_steps=16", "--config.eval.sample_tokens=0",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr

  def generate(where, **more):
    # As the installed command: neither folder is on the path.
    return subprocess.run(
      [sys.executable, "-P", "-m", "moejax", "generate", str(place / "mine"),
       "--max-tokens=2"],
      cwd=where, env=environment() | more, capture_output=True, text=True,
    )  # fmt: skip

  assert generate(place).returncode == 0
  elsewhere = generate(tmp_path)
  assert elsewhere.returncode == 2
  assert f"PYTHONPATH={place}" in elsewhere.stderr
  paths = os.pathsep.join([str(place), environment()["PYTHONPATH"]])
  assert generate(tmp_path, PYTHONPATH=paths).returncode == 0
  # A folder from elsewhere may bring code; it is not run.
  (place / "mine" / "mine.py").write_text("open('was_run', 'w')\n")
  inside = generate(place / "mine")
  assert inside.returncode == 2
  assert "lies in the run's own folder" in inside.stderr
  assert not (place / "mine" / "was_run").exists()
  (place / "mine" / "mine.py").unlink()
  # Nor by a way around: the folders above it are packages to Python.
  path = place / "mine" / "config.json"
  path.write_text(path.read_text().replace("mine.worst", "mine.evil.worst"))
  (place / "mine" / "evil.py").write_text("open('was_run', 'w')\n")
  (place / "mine.py").rename(place / "other.py")
  above = generate(place)
  assert above.returncode == 2
  assert "lies in the run's own folder" in above.stderr
  assert not (place / "was_run").exists()


class Sentinel:
  """A pickle of this makes a file when it is loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_a_hubs_folder_runs_nothing(tmp_path):
  sentinel = tmp_path / "was_run"
  olmoe = next(f for f in families.FAMILIES if f.name == "olmoe")
  folder = write(
    tmp_path / "hub", olmoe, auto_map={"AutoModel": "modeling_evil.Evil"}
  )
  (folder / "modeling_evil.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
  load_hf(folder)
  (folder / "model.safetensors").unlink()
  with open(folder / "pytorch_model.bin", "wb") as f:
    pickle.dump(Sentinel(sentinel), f)
  with pytest.raises(DataError, match="is a pickle, which may run code"):
    load_hf(folder)
  assert not sentinel.exists()


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "..",
                                  "a/../../out.safetensors"])  # fmt: skip
def test_an_index_leads_nowhere_else(tmp_path, name):
  olmoe = next(f for f in families.FAMILIES if f.name == "olmoe")
  folder = write(tmp_path / "hub", olmoe)
  (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
  index = {"weight_map": {"model.norm.weight": name}}
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  with pytest.raises(DataError, match="not a file beside it"):
    load_hf(folder)
