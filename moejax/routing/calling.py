# SPDX-License-Identifier: Apache-2.0
"""How a router is called, and where in a person's code it went wrong."""

import linecache
import os
import re
import traceback

import jax

from moejax.errors import ConfigError, UserError
from moejax.routing.base import (
  ChoiceError,
  Router,
  Routing,
  check_routing,
  code_of,
  file_of,
  short_path,
)
from moejax.routing.inputs import asks_for, takes_rng

Array = jax.Array

_RNG = (
  "in evaluation rng is None; in training it is one key a token, [T]: jax.vmap "
  "over it"
)


def call_router(
  router: Router,
  name: str,
  logits_TE: Array,
  mask_T: Array,
  rng: Array | None,
  inputs: dict[str, Array],
) -> Routing:
  """What a router says.

  Args:
    router: with its options bound.
    name: as the config writes it.
    logits_TE, mask_T: of the tokens.
    rng: a key each, [T], or None; left out if the router has no such parameter.
    inputs: what else it asks for, by its parameter's name.

  Raises:
    ConfigError: what it returned is no Routing, or whatever it raised, with its
      name and the line.
  """
  keys = {"rng": rng} if takes_rng(router) else {}
  try:
    routing = router(logits_TE, mask_T, **keys, **inputs)
  except ChoiceError as e:
    raise ConfigError(f"router {name} ({_line_of(router, e)}): {e}") from e
  except UserError:
    raise
  except Exception as e:  # whatever a person's code may raise
    hint = f"; {_RNG}" if _is_about_rng(router, e) else ""
    raise ConfigError(
      f"router {name} ({_line_of(router, e)}) raised {in_a_line(e)}{hint}"
    ) from e
  return check_routing(routing, logits_TE, router, name)


def innermost(error: BaseException, file: str) -> traceback.FrameSummary | None:
  """The last frame in a file or its neighbours; None if it went by neither."""
  folder = os.path.dirname(file)
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
    or (folder and os.path.dirname(frame.filename) == folder)
  ]
  return frames[-1] if frames else None


def in_a_line(error: BaseException) -> str:
  """Its type, and the first line of what it says."""
  lines = str(error).strip().splitlines()
  return ": ".join([type(error).__name__, *lines[:1]]).rstrip(".")


def _frame(router: Router, e: Exception) -> traceback.FrameSummary | None:
  code = code_of(router)
  return innermost(e, code.co_filename) if code else None


def _line_of(router: Router, e: Exception) -> str:
  frame = _frame(router, e)
  if frame is None:
    return file_of(router)
  return f"{short_path(frame.filename)}:{frame.lineno}"


def _is_about_rng(router: Router, e: Exception) -> bool:
  """By what it says and by the source that raised it."""
  if not asks_for(router, "rng"):
    return False
  said, frame = str(e), _frame(router, e)
  if frame is not None:
    last = frame.end_lineno or frame.lineno
    numbers = range(frame.lineno, last + 1)
    said += "".join(linecache.getline(frame.filename, n) for n in numbers)
  return re.search(r"\brng\b|PRNG|a single key", said) is not None
