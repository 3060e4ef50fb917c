# SPDX-License-Identifier: Apache-2.0
"""What options are declared and checked with."""

import dataclasses
import difflib
import math
import re
from typing import Any

from moejax.errors import ConfigError

# Steps, rows and seeds are 32-bit integers on every device.
LARGEST = 2**31 - 1


def option(default: Any, doc: str) -> Any:
  """A dataclass field with its documentation."""
  return dataclasses.field(default=default, metadata={"doc": doc})


def section(cls: type, doc: str) -> Any:
  return dataclasses.field(default_factory=cls, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
      f"{key}={value!r} is not one of {', '.join(choices)}{hint}"
    )


def require_pattern(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as e:
    raise ConfigError(
      f"{key}: {pattern!r} is no regular expression: {e}"
    ) from None


def require_positive(prefix: str, obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value > 0, f"{prefix}.{name}={value} must be positive")


def multiples(n: int, of: int) -> str:
  """The multiples around `n`."""
  below = n - n % of
  return f"{below} or {below + of}" if below else str(of)


def nearest_divisor(n: int, wanted: int) -> int:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  divisors = {*small, *(n // d for d in small)}
  return min(divisors, key=lambda d: (abs(d - wanted), d))
