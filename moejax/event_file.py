# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files, through tensorboardX's record writer."""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 30.0


class EventFile:
  """One event file, written in the caller's thread; errors are OSErrors.

  tensorboardX's SummaryWriter hands events to a thread through a bounded queue;
  a full disk kills that thread, and the next `put` blocks training for good.
  """

  def __init__(self, folder: Path, resume_step: int):
    events_writer, self._event_pb2, self._summary_pb2 = _import_tensorboardx()
    folder.mkdir(parents=True, exist_ok=True)
    # The suffix keeps two openings within one second apart.
    suffix = f".{time.time_ns()}"
    self._writer = events_writer(str(folder / "events"), suffix)
    # Tells TensorBoard to forget what older files hold from here on.
    start = self._event_pb2.SessionLog(
      status=self._event_pb2.SessionLog.SessionStatus.Value("START")
    )
    purge_step = resume_step + 1 if resume_step else 0
    self._writer.write_event(
      self._event_pb2.Event(
        wall_time=time.time(), step=purge_step, session_log=start
      )
    )
    self._flushed = time.monotonic()

  def add(self, step: int, values: Mapping[str, float], prefix: str) -> None:
    summary = self._summary_pb2.Summary(
      value=[
        self._summary_pb2.Summary.Value(
          tag=prefix + key, simple_value=float(value)
        )
        for key, value in values.items()
      ]
    )
    self._writer.write_event(
      self._event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
    )
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    self._flushed = time.monotonic()
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def abandon(self) -> None:
    """Lets go of a file that cannot be written, without another error."""
    # EventsWriter.close() stops at its failing flush and leaves the file open;
    # its garbage collection would complain on stderr.
    with contextlib.suppress(OSError):
      self._writer._py_recordio_writer.close()


def _import_tensorboardx() -> tuple[Any, Any, Any]:
  """The event writer and its two message modules, without importing torch."""
  # tensorboardX imports torch if it can (3 s, 200 MB) and does as well without.
  blocked = "torch" not in sys.modules
  if blocked:
    sys.modules["torch"] = None  # type: ignore[assignment]
  try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2
  finally:
    if blocked:
      del sys.modules["torch"]
  return EventsWriter, event_pb2, summary_pb2
