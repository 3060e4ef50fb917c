# SPDX-License-Identifier: Apache-2.0
"""What processes tell process 0 of their part of a checkpoint."""

import errno

import pytest
from etils import epath

from moejax.checkpoint import files, processes, shares
from moejax.errors import CheckpointError


@pytest.fixture
def process(monkeypatch):
  """Makes this one the so manyth of two."""

  def become(index):
    monkeypatch.setattr(processes, "index_and_count", lambda: (index, 2))
    monkeypatch.setattr(processes, "is_first", lambda: index == 0)

  become(1)
  return become


@pytest.fixture
def folder(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).write_text(name * 9)
  return epath.Path(tmp_path)


def test_both_have_digested_all_files_once(process, folder):
  other = shares.digest(folder)
  process(0)
  own = shares.digest(folder)
  assert shares.told_failure(folder) is None
  assert shares.collect(folder) == other
  assert sorted([*own, *other]) == ["a", "b"]
  assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]


def test_a_reason_is_told(process, folder):
  shares.tell_failure(folder, OSError(errno.EIO, "the disk is broken"))
  process(0)
  failure = shares.told_failure(folder)
  assert "process 1 could not write its part" in str(failure)
  assert "the disk is broken" in str(failure)


@pytest.mark.parametrize("left", ["nothing", "an empty file", "a part"])
def test_a_disk_that_is_too_full_to_tell(process, folder, monkeypatch, left):
  def full(path, text):
    if left != "nothing":
      path.write_text(text[:9] if left == "a part" else "")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(files, "write_text", full)
  with pytest.raises(OSError, match="No space"):
    shares.digest(folder)
  shares.tell_failure(folder, OSError(errno.ENOSPC, "No space left"))
  process(0)
  assert shares.told_failure(folder) is None  # process 0's own reason stands
  with pytest.raises(CheckpointError, match="process 1 could not write its"):
    shares.collect(folder)
