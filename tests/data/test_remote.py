# SPDX-License-Identifier: Apache-2.0
"""Token stores at s3://, on a public emulator of it."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from moejax import storage
from moejax.objectlock import ObjectLock
from moejax.runlock import RunLockError
from tests.small_run import make_place, moejax

BUCKET = "s3://moejax-test"


@pytest.fixture(scope="module")
def s3():
  for package in ("s3fs", "moto"):
    if importlib.util.find_spec(package) is None:
      pytest.skip("needs s3fs and moto: make install-storage")
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  url = f"http://127.0.0.1:{port}"
  try:
    _wait_for(url)
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
      patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
      patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
      patch.setenv("AWS_ENDPOINT_URL", url)
      import s3fs

      s3fs.S3FileSystem().mkdir(BUCKET)
      yield
  finally:
    server.kill()
    server.wait()


def _wait_for(url):
  end = time.monotonic() + 60
  while time.monotonic() < end:
    try:
      urllib.request.urlopen(url, timeout=5).close()
      return
    except OSError:
      time.sleep(0.1)
  raise TimeoutError("the emulator did not start")


def test_objects(s3):
  storage.write(f"{BUCKET}/a/b", b"1")
  storage.write(f"{BUCKET}/a/c/d", b"22")
  assert storage.read(f"{BUCKET}/a/b") == b"1"
  assert storage.names(f"{BUCKET}/a") == ["b", "c"]
  assert storage.sizes(f"{BUCKET}/a") == {"b": 1, "c/d": 2}
  assert storage.names(f"{BUCKET}/none") == []
  with pytest.raises(FileExistsError):
    storage.write(f"{BUCKET}/a/b", b"2", new=True)
  with pytest.raises(FileNotFoundError):
    storage.read(f"{BUCKET}/a")
  with pytest.raises(storage.StorageError, match="no such bucket"):
    storage.write("s3://moejax-none/a", b"")
  storage.remove(f"{BUCKET}/a/none")
  storage.remove_all(f"{BUCKET}/a")
  assert storage.sizes(f"{BUCKET}/a") == {}


def test_a_lock(s3):
  with ObjectLock(f"{BUCKET}/run"):
    with pytest.raises(RunLockError, match="in use by the run with pid"):
      ObjectLock(f"{BUCKET}/run").acquire()


def test_a_store_is_made_here_and_read_elsewhere(s3, tmp_path, monkeypatch):
  place = make_place(tmp_path)
  option = f"--config.data.store={BUCKET}/tokens"
  prepare = ("data", "prepare", "--config=config.py", option)
  for cache in ("here", "elsewhere"):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    done = moejax(place, *prepare)
    assert done.returncode == 0, done.stderr
  assert "copying s3://" in done.stdout and "ready" in done.stdout
  shards = [
    sorted((tmp_path / cache).rglob("token_store-*"))
    for cache in ("here", "elsewhere")
  ]
  assert len(shards[0]) == len(shards[1]) == 2
  for one, other in zip(*shards):
    assert one.read_bytes() == other.read_bytes()
