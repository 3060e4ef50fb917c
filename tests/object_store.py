# SPDX-License-Identifier: Apache-2.0
"""A bucket on this machine: a public emulator behind a proxy that has faults.

The emulator ignores preconditions such as `ifGenerationMatch=0` (write only
what is not there), which a lock and TensorStore need, so the proxy sees to
them. It can also refuse requests, and counts them.
"""

import contextlib
import http.client
import http.server
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest

BUCKET = "moejax-test"
EMULATOR = "gcp_storage_emulator"
# Headers of one connection, not of the message.
HOP = {"connection", "transfer-encoding", "keep-alive", "host"}


def require(*packages):
  """Skips the test where a package is not installed."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      pytest.skip("needs gcsfs and gcp-storage-emulator: make install-storage")


class Bucket:
  """gs://moejax-test, alone for one test module; a context manager."""

  def __enter__(self):
    port = _free_port()
    self._emulator = subprocess.Popen(
      [sys.executable, "-m", EMULATOR, "start", "--host=127.0.0.1",
       f"--port={port}", "-M", "-q", f"--default-bucket={BUCKET}"],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _wait_for(port)
    self._server = _Server(("127.0.0.1", 0), _handler(self, port))
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    self.lock = threading.Lock()
    self.faults = []  # [pattern of "METHOD path", status, how often, every]
    self.matched = 0
    self.refused = 0
    self.served = 0
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exc_info):
    self._server.shutdown()
    self._server.server_close()
    self._emulator.kill()
    self._emulator.wait()

  def environment(self):
    """What makes the libraries take it for Google's."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "NO_GCE_CHECK": "true",
      # Else gcsfs asks Google, not the emulator, for the bucket's kind.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def refuse(self, pattern, status, times, every=1):
    """Answers every n-th request whose `METHOD path` matches with an error."""
    self.refused = self.matched = 0
    self.faults = [[re.compile(pattern), status, times, every]]

  def fault(self, line):
    """The status that a request is refused with, or None."""
    with self.lock:
      self.served += 1
      for fault in self.faults:
        pattern, status, left, every = fault
        if not left or not pattern.search(line):
          continue
        self.matched += 1
        if self.matched % every == 0:
          fault[2] -= 1
          self.refused += 1
          return status
    return None


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address):
    """A client that was killed is no error of the server."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


def _handler(bucket, port):
  """Forwards to the emulator what the bucket does not refuse."""

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
      size = int(self.headers["Content-Length"] or 0)
      body = self.rfile.read(size)
      if status := bucket.fault(f"{self.command} {self.path}"):
        self._answer(status, [], b'{"error": {"message": "injected"}}')
        return
      name, query = _object_of(self.path, body)
      if name is None:
        self._forward(body, [])
        return
      with bucket.lock:  # no write between a precondition and its request
        generation = _generation(port, name)
        wanted = query.get("ifGenerationMatch", [generation])
        known = query.get("ifGenerationNotMatch", [None])
        if wanted != [generation]:
          self._answer(412, [], b'{"error": {"message": "precondition"}}')
        elif known == [generation]:
          self._answer(304, [], b"")
        else:
          media = self.command == "GET" and generation != "0"
          self._forward(
            body, [("x-goog-generation", generation)] if media else []
          )

    def _forward(self, body, more):
      kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
      status, headers, answer = _ask(port, self.command, self.path, body, kept)
      self._answer(status, headers + more, answer)

    def _answer(self, status, headers, answer):
      self.send_response(status)
      for name, value in headers:
        if name.lower() not in HOP | {"content-length", "date", "server"}:
          self.send_header(name, value)
      if self.command != "HEAD":
        self.send_header("Content-Length", str(len(answer)))
      with contextlib.suppress(ConnectionError):  # killed, or lost interest
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
      """Says nothing."""

  for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
    setattr(Handler, f"do_{method}", Handler._serve)
  return Handler


def _object_of(path, body):
  """The object that a request reads, writes or deletes, and its query."""
  parts = urllib.parse.urlsplit(path)
  query = urllib.parse.parse_qs(parts.query)
  found = re.search(r"/b/[^/]+/o/(.+)$", parts.path)
  if found:
    return urllib.parse.unquote(found[1]), query
  if "/upload/" in parts.path and "upload_id" not in query:
    if "name" in query:
      return query["name"][0], query
    return re.search(rb'"name": "([^"]*)"', body)[1].decode(), query
  return None, query


def _generation(port, name):
  """The number of what is there; 0 for nothing."""
  where = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
  status, _, answer = _ask(port, "GET", where, b"", {})
  return json.loads(answer)["generation"] if status == 200 else "0"


def _ask(port, method, path, body, headers):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  try:
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.getheaders(), answer.read()
  finally:
    connection.close()


def _free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def _wait_for(port):
  end = time.monotonic() + 60
  while time.monotonic() < end:
    try:
      urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
      return
    except OSError:
      time.sleep(0.1)
  raise TimeoutError("the emulator did not start")
