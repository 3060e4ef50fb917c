# SPDX-License-Identifier: Apache-2.0
"""XLA's typed foreign-function interface in ctypes: no compiler needed.

The structures follow `jaxlib/include/xla/ffi/api/c_api.h`, API major version 0
(a major change is the only one that may move fields). `handler(fn)` makes a C
function out of a Python one; a Python exception becomes an XLA error.
"""

import ctypes as c
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_INVALID_ARGUMENT, _INTERNAL = 3, 13
_METADATA, _EXECUTE = 1, 3
_API_MAJOR = 0
_STATUS_FN = c.CFUNCTYPE(c.c_void_p, c.c_void_p)
_TASK_FN = c.CFUNCTYPE(None, c.c_void_p)


def _struct(name: str, *fields: tuple[str, Any]) -> type[c.Structure]:
  head = [("struct_size", c.c_size_t), ("extension", c.c_void_p)]
  return type(name, (c.Structure,), {"_fields_": [*head, *fields]})


_Version = _struct("Version", ("major", c.c_int), ("minor", c.c_int))
_Extension = type(
  "Extension",
  (c.Structure,),
  {
    "_fields_": [
      ("struct_size", c.c_size_t),
      ("type", c.c_int),
      ("next", c.c_void_p),
      ("metadata", c.c_void_p),
    ]
  },
)
_Metadata = type(
  "Metadata",
  (c.Structure,),
  {
    "_fields_": [
      ("struct_size", c.c_size_t),
      ("version", _Version),
      ("traits", c.c_uint32),
    ]
  },
)
_Api = _struct(
  "Api",
  ("version", _Version),
  ("internal", c.c_void_p),
  ("error_create", _STATUS_FN),
  *((f"_{i}", c.c_void_p) for i in range(10)),
  ("schedule", _STATUS_FN),
  ("num_threads", _STATUS_FN),
)
_Buffer = _struct(
  "Buffer",
  ("dtype", c.c_int),
  ("data", c.c_void_p),
  ("rank", c.c_int64),
  ("dims", c.POINTER(c.c_int64)),
)
_List = _struct(
  "List",
  ("size", c.c_int64),
  ("types", c.c_void_p),
  ("items", c.POINTER(c.POINTER(_Buffer))),
)
_Frame = _struct(
  "Frame",
  ("api", c.POINTER(_Api)),
  ("ctx", c.c_void_p),
  ("stage", c.c_int),
  ("args", _List),
  ("rets", _List),
)
_Error = _struct("Error", ("message", c.c_char_p), ("code", c.c_int))
_NumThreads = _struct(
  "NumThreads", ("ctx", c.c_void_p), ("out", c.POINTER(c.c_int64))
)
_Schedule = _struct(
  "Schedule", ("ctx", c.c_void_p), ("task", _TASK_FN), ("data", c.c_void_p)
)


class Buffer(NamedTuple):
  """One argument or result: XLA's element type, address and shape."""

  dtype: int
  data: int
  shape: tuple[int, ...]


class Pool:
  """XLA's own compute threads, as seen from one call of a handler."""

  def __init__(self, frame):
    self._api, self._ctx = frame.api.contents, frame.ctx

  def num_threads(self) -> int:
    out = c.c_int64(1)
    args = _NumThreads(c.sizeof(_NumThreads), None, self._ctx, c.pointer(out))
    failed = self._api.num_threads(c.addressof(args))
    return 1 if failed else out.value

  def run(self, jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Runs every job; returns when all are done; raises the first error.

    The caller works too and only ever waits for jobs that are running, so a
    pool whose threads are all busy or blocked costs speed, never a deadlock.
    """
    work = _Work(jobs)
    key = next(_keys)
    _works[key] = work
    try:
      for _ in range(min(threads, len(jobs)) - 1):
        args = _Schedule(c.sizeof(_Schedule), None, self._ctx, _help, key)
        if self._api.schedule(c.addressof(args)):
          break  # no pool: this thread does everything
      work.take_jobs()
      work.finished.acquire()
    finally:
      del _works[key]
    if work.error is not None:
      raise work.error


class _Work:
  """Jobs taken one by one by whichever thread comes first."""

  def __init__(self, jobs):
    self._jobs = jobs
    self._taken, self._done = itertools.count(), itertools.count(1)
    self.finished = threading.Lock()
    self.finished.acquire()
    self.error = None

  def take_jobs(self) -> None:
    while (i := next(self._taken)) < len(self._jobs):
      try:
        self._jobs[i]()
      except BaseException as e:  # pylint: disable=broad-except
        self.error = e
      if next(self._done) == len(self._jobs):
        self.finished.release()


_keys = itertools.count(1)
_works: dict[int, _Work] = {}


@_TASK_FN
def _help(key):
  work = _works.get(key)
  if work is not None:  # else the caller has finished without help
    work.take_jobs()


def _buffers(items) -> list[Buffer]:
  found = []
  for i in range(items.size):
    b = items.items[i].contents
    found.append(Buffer(b.dtype, b.data, tuple(b.dims[: b.rank])))
  return found


def _error(api, message: str, code: int) -> int:
  args = _Error(c.sizeof(_Error), None, message.encode(), code)
  return api.error_create(c.addressof(args))


def handler(fn: Callable[[list[Buffer], list[Buffer], Pool], None]):
  """A C function for `jax.ffi.pycapsule`; the caller must keep it alive."""

  def call(address):
    frame = _Frame.from_address(address)
    if frame.extension:
      extension = _Extension.from_address(frame.extension)
      if extension.type == _METADATA:
        _answer_metadata(frame, _Metadata.from_address(extension.metadata))
        return None
    if frame.stage != _EXECUTE:
      return None
    try:
      fn(_buffers(frame.args), _buffers(frame.rets), Pool(frame))
      return None
    except ValueError as e:
      return _error(frame.api.contents, str(e), _INVALID_ARGUMENT)
    except BaseException as e:  # pylint: disable=broad-except
      # An exception that leaves a ctypes callback is printed and lost, and
      # XLA would go on with an unwritten result.
      return _error(frame.api.contents, repr(e), _INTERNAL)

  return _STATUS_FN(call)


def _answer_metadata(frame, metadata) -> None:
  # The fields used here are the same in every minor version, so the answer is
  # the caller's own; another major version is refused by XLA at registration.
  minor = 3
  if frame.api and frame.api.contents.version.major == _API_MAJOR:
    minor = frame.api.contents.version.minor
  metadata.version.major, metadata.version.minor = _API_MAJOR, minor
  metadata.traits = 0
