# SPDX-License-Identifier: Apache-2.0
"""Names with arguments in a config string: `top_k(k=8, score="sigmoid")`.

The string is parsed, never evaluated: a dotted name and keyword literals.
"""

import ast
import dataclasses
import math
import sys
from typing import Any, Self

# What parsing text that is no Python, or far too deep, may raise.
_NO_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Spec:
  """A function's name and its keyword arguments."""

  name: str
  kwargs: dict[str, Any]

  @classmethod
  def parse(cls, text: str) -> Self:
    """Parses `name`, `name(k=1)` or `pkg.module.name(k=1)`.

    Raises:
      ValueError: anything but a dotted name and keyword literals, each once and
        finite.
    """
    try:
      node = ast.parse(text.strip(), mode="eval").body
    except _NO_PYTHON:
      raise ValueError(
        f"{text[:200]!r} is not of the form name(key=value)"
      ) from None
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if call.args:
      raise ValueError(f"{text!r}: write arguments as key=value")
    kwargs = {}
    for keyword in call.keywords:
      if keyword.arg is None:
        raise ValueError(f"{text!r}: write arguments as key=value")
      if keyword.arg in kwargs:
        raise ValueError(f"{text!r} has {keyword.arg} twice; leave one out")
      try:
        kwargs[keyword.arg] = ast.literal_eval(keyword.value)
      except _NO_PYTHON:
        raise ValueError(
          f"{text!r}: {keyword.arg} must be a literal such as 8, 0.5 or 'name'"
        ) from None
      value = kwargs[keyword.arg]
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
          f"{text!r}: {keyword.arg} is beyond any float; give a finite number"
        )
    return cls(_dotted(call.func, text), kwargs)

  @property
  def is_of_python(self) -> bool:
    """Whether it is of Python's own library, where nothing is to be named."""
    return self.name.partition(".")[0] in sys.stdlib_module_names

  def __str__(self) -> str:
    options = ", ".join(f"{k}={v!r}" for k, v in self.kwargs.items())
    return f"{self.name}({options})"


def _dotted(node: ast.expr, text: str) -> str:
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute):
    return f"{_dotted(node.value, text)}.{node.attr}"
  raise ValueError(f"{text!r} does not start with a name")
