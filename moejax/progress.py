# SPDX-License-Identifier: Apache-2.0
"""Progress on stdout: one live line in a terminal, plain lines elsewhere.

A terminal gets a bar that is redrawn in place. Log files, pipes and notebooks
get whole lines: each of the first steps, then every 5 s, growing to 30 s, and
always the last one. Whatever the terminal does, the run goes on.
"""

import collections
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, Self, TextIO

FIRST_LINES = 3
SHORTEST_INTERVAL = 5.0
LONGEST_INTERVAL = 30.0
INTERVAL_GROWTH = 1.25
REDRAWS_PER_SECOND = 4
# Steps that the time left is estimated from.
RATE_WINDOW = 100
MIN_LIVE_WIDTH = 16
MIN_BAR_WIDTH = 10
# Their shells run commands in a pseudo-terminal but show no redrawn lines.
NOTEBOOK_VARIABLES = (
  "COLAB_RELEASE_TAG", "JPY_PARENT_PID", "KAGGLE_KERNEL_RUN_TYPE"
)  # fmt: skip
# Escape sequences in a model's text must not steer the terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TrainProgress:
  """Shows how far training is; use as a context manager."""

  def __init__(
    self, total_steps: int, start_step: int, stream: TextIO | None = None
  ):
    """Args:
    total_steps: steps of the whole run.
    start_step: finished steps at the start; above 0 in a resumed run.
    stream: where to, stdout if None.
    """
    self._total = total_steps
    self._start = start_step
    self._display = _make_display(stream)
    self._rate = _Rate()

  def update(
    self, step: int, *, loss: float, tokens_per_second: float,
    learning_rate: float | None = None,
  ) -> None:  # fmt: skip
    """Shows a finished step; cheap enough for every step."""
    self._rate.add(step)
    left = self._rate.seconds_left(self._total - step)
    width = len(str(self._total))
    fields = [
      f"step {step:>{width}}/{self._total}",
      f"loss {loss:.4f}",
    ]
    if tokens_per_second > 0:  # NaN or 0 before the first measurement
      fields.append(f"{format_count(tokens_per_second)} tokens/s")
    if left is not None:
      fields.append(f"{format_seconds(left)} left")
    if learning_rate is not None:
      fields.append(f"lr {learning_rate:.2e}")
    self._display.show(step / max(1, self._total), fields)

  def message(self, text: str) -> None:
    """Prints lines that stay, above the bar."""
    self._display.message(text)

  def __enter__(self) -> Self:
    self._display.start()
    if self._start:
      self.message(f"going on after step {self._start} of {self._total}")
    return self

  def __exit__(self, *exc_info) -> None:
    self._display.stop()


class ProgressBar:
  """Counts towards `total`; made by `progress_bar`."""

  def __init__(
    self, description: str, total: int | None, done: int, display: "_Display"
  ):
    self._description = description
    self._total = total
    self._done = done
    self._rate = _Rate()
    self._display = display

  def advance(self, count: int = 1) -> None:
    self._done += count
    self._rate.add(self._done)
    if self._total is None:
      self._display.show(None, [self._description, format_count(self._done)])
      return
    fields = [self._description, f"{self._done}/{self._total}"]
    left = self._rate.seconds_left(self._total - self._done)
    if left is not None:
      fields.append(f"{format_seconds(left)} left")
    self._display.show(self._done / max(1, self._total), fields)

  def message(self, text: str) -> None:
    """Prints lines that stay, above the bar."""
    self._display.message(text)


@contextlib.contextmanager
def progress_bar(
  description: str,
  total: int | None,
  stream: TextIO | None = None,
  done: int = 0,
) -> Iterator[ProgressBar]:
  """Progress of any work; call `.advance(n)` on what it yields.

  Args:
    description: what is done, e.g. "tokenizing".
    total: how many there are; None if unknown.
    stream: where to, stdout if None.
    done: how many of them were done before; they took no time.
  """
  display = _make_display(stream)
  display.start()
  try:
    yield ProgressBar(description, total, done, display)
  finally:
    display.stop()


def printable(text: str, stream: TextIO) -> str:
  """The text without control characters, and with `?` for what the stream's
  encoding lacks: an ASCII terminal is no error."""
  text = CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
  encoding = stream.encoding or "utf-8"
  return text.encode(encoding, "replace").decode(encoding)


def format_count(number: float) -> str:
  """1234567 as `1.23M`: three digits, SI prefix."""
  if not abs(number) < 1e18:  # also NaN
    return f"{number:.3g}"
  for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
    if abs(number) >= size * 0.9995:
      return f"{number / size:.3g}{prefix}"
  if abs(number) >= 1000:
    return f"{number / 1000:.3g}k" if abs(number) < 999500 else "1M"
  return f"{number:.3g}"


def format_bytes(number: float) -> str:
  """1610612736 as `1.5 GiB`: three digits."""
  number /= 2**10
  for unit in ("KiB", "MiB", "GiB"):
    if number < 999.5:
      return f"{number:.3g} {unit}"
    number /= 2**10
  return f"{number:.3g} TiB"


def format_seconds(seconds: float) -> str:
  """3725 as `1 h 02 min`; two units at most."""
  whole = round(seconds)
  minutes, hours, days = whole // 60, whole // 3600, whole // 86400
  if days:
    return f"{days} d {hours % 24:02} h"
  if hours:
    return f"{hours} h {minutes % 60:02} min"
  if minutes:
    return f"{minutes} min {whole % 60:02} s"
  return f"{whole} s"


class _Rate:
  """Seconds per count over the last updates."""

  def __init__(self) -> None:
    self._seen: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=RATE_WINDOW
    )

  def add(self, count: int) -> None:
    # The time before the first update is compilation: not counted.
    self._seen.append((count, time.monotonic()))

  def seconds_left(self, remaining: int) -> float | None:
    """None where there is nothing to tell: too early, or done."""
    (count0, time0), (count1, time1) = self._seen[0], self._seen[-1]
    if count1 <= count0 or time1 <= time0 or remaining <= 0:
      return None
    return remaining * (time1 - time0) / (count1 - count0)


class _Display:
  """What both kinds share: an error switches the display off, for good."""

  def __init__(self, stream: TextIO):
    self._stream = stream
    self._broken = False

  def start(self) -> None:
    self._guard(self._start)

  def show(self, fraction: float | None, fields: list[str]) -> None:
    self._guard(self._show, fraction, fields)

  def message(self, text: str) -> None:
    self._guard(self._message, printable(text, self._stream))

  def stop(self) -> None:
    self._guard(self._stop)

  def _guard(self, function, *args) -> None:
    """A closed pipe or an odd terminal must not end a run of days."""
    if self._broken:
      return
    try:
      function(*args)
    except Exception as e:
      self._broken = True
      with contextlib.suppress(Exception):
        print(f"progress display is off: {e!r}", file=sys.__stderr__)


class _Plain(_Display):
  """Whole lines at growing intervals."""

  def _start(self) -> None:
    self._lines = 0
    self._next = 0.0
    self._interval = SHORTEST_INTERVAL
    self._waiting: str | None = None

  def _show(self, fraction: float | None, fields: list[str]) -> None:
    self._waiting = "  ".join(fields)
    now = time.monotonic()
    done = fraction is not None and fraction >= 1
    if self._lines >= FIRST_LINES and now < self._next and not done:
      return
    self._print_waiting()
    if self._lines > FIRST_LINES:
      self._interval = min(LONGEST_INTERVAL, self._interval * INTERVAL_GROWTH)
    self._next = now + self._interval

  def _print_waiting(self) -> None:
    if self._waiting is not None:
      self._message(printable(self._waiting, self._stream))
      self._lines += 1
      self._waiting = None

  def _message(self, text: str) -> None:
    self._stream.write(text + "\n")
    self._stream.flush()

  def _stop(self) -> None:
    self._print_waiting()


class _Live(_Display):
  """One line that rich redraws; other prints appear above it."""

  def _start(self) -> None:
    import rich.console
    import rich.live

    self._fraction: float | None = 0.0
    self._fields = ["starting"]
    self._live = rich.live.Live(
      self,
      console=rich.console.Console(file=self._stream, highlight=False),
      refresh_per_second=REDRAWS_PER_SECOND,
    )
    self._live.start()

  def _show(self, fraction: float | None, fields: list[str]) -> None:
    # The refresh thread reads these: two plain assignments, no lock.
    self._fraction, self._fields = fraction, fields

  def _message(self, text: str) -> None:
    from rich.text import Text

    self._live.console.print(Text(text))

  def _stop(self) -> None:
    self._live.stop()

  def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
    """The bar and as many fields as the width has room for, in one line."""
    from rich.progress_bar import ProgressBar as Bar
    from rich.table import Table
    from rich.text import Text

    fields = list(self._fields)
    while len(fields) > 1 and _width(fields) > options.max_width:
      fields.pop()
    room = options.max_width - _width(fields) - 2
    text = Text("  ".join(fields), no_wrap=True, overflow="crop")
    if room < MIN_BAR_WIDTH or self._fraction is None:
      yield text
      return
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    bar = Bar(
      100.0, 100.0 * self._fraction, width=min(40, room),
      complete_style="cyan", finished_style="green",
    )  # fmt: skip
    grid.add_row(bar, text)
    yield grid


def _width(fields: list[str]) -> int:
  return sum(map(len, fields)) + 2 * (len(fields) - 1)


def _make_display(stream: TextIO | None) -> _Display:
  stream = sys.stdout if stream is None else stream
  return _Live(stream) if _can_redraw(stream) else _Plain(stream)


def _can_redraw(stream: TextIO) -> bool:
  try:
    if not stream.isatty():
      return False
    columns = os.get_terminal_size(stream.fileno()).columns
  except (OSError, ValueError, AttributeError):
    return False
  if any(name in os.environ for name in NOTEBOOK_VARIABLES):
    return False
  # A terminal that reports no size at all is taken for 80 columns by rich.
  if 0 < columns < MIN_LIVE_WIDTH:
    return False
  return "TERM" in os.environ and os.environ["TERM"] not in ("dumb", "unknown")
