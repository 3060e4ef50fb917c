# SPDX-License-Identifier: Apache-2.0
"""Conversions that are killed go on, and end with the bytes of whole ones."""

import os
import subprocess
import time

import numpy as np
import pytest

from tests.convert import families as hf
from tests.convert.hub_folder import write
from tests.small_run import command, environment, moejax

OLMOE = hf.FAMILIES[0]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """Large enough to be seen while it is written."""
  tensors = hf.tensors(OLMOE)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors[name] = np.tile(tensors[name], (2000, 1))
  folder = tmp_path_factory.mktemp("conversion") / "hub"
  return write(folder, OLMOE, tensors, vocab_size=2000 * hf.V)


def files_of(folder):
  found = sorted(p for p in folder.rglob("*") if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def entries(folder):
  """How many; walking is not stopped by what vanishes meanwhile."""
  return sum(len(dirs) + len(files) for _, dirs, files in os.walk(folder))


def killed_at(place, files, *args):
  """Kills the command once its folder holds so many files; True if it could."""
  target = place / args[-1]
  process = subprocess.Popen(
    command("convert", *args), cwd=place, env=environment(),
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  while process.poll() is None:
    if entries(target) >= files:
      process.kill()
      process.wait()
      # What is read first, and written last.
      return not (target / "config.json").exists()
    time.sleep(0.001)
  return False


def finished(place, *args):
  done = moejax(place, "convert", *args)
  assert done.returncode == 0, done.stderr
  return files_of(place / args[-1])


def weights(found):
  """What has no time or path in it."""
  return {
    name: data
    for name, data in found.items()
    if "/params/" in name and "commit" not in name
  }


@pytest.mark.parametrize(
  "words, moments", [(("from-hf", "hub"), (8, 30, 60)),
                     (("to-hf", "--shard-size=0.002", "run"), (1, 2, 4))],
)  # fmt: skip
def test_killed_on_the_way(hub, words, moments, tmp_path):
  place = tmp_path
  (place / "hub").symlink_to(hub)
  if words[0] == "to-hf":
    finished(place, "from-hf", "hub", "run")
  whole = finished(place, *words, "whole")
  kills = [killed_at(place, n, *words, "killed") for n in moments]
  assert any(kills)
  again = finished(place, *words, "killed")
  if words[0] == "from-hf":
    again, whole = weights(again), weights(whole)
  assert len(whole) > 5
  assert again == whole
