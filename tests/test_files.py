# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest

from moejax.files import write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  write_atomically(path, "old")

  def full(fd):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space"):
    write_atomically(path, "new")
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.json"]


def test_an_equal_file_is_not_touched(tmp_path):
  path = tmp_path / "ü.json"
  write_atomically(path, "é")
  before = path.stat()
  write_atomically(path, "é")
  assert path.stat() == before
  write_atomically(path, "e")
  assert path.read_bytes() == b"e"
