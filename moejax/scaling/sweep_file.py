# SPDX-License-Identifier: Apache-2.0
"""Planned points as a sweep file, which `moejax sweep` runs."""

import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.config import Config
from moejax.errors import ConfigError, UserError
from moejax.files import write_atomically
from moejax.progress import format_count
from moejax.scaling.sweep import PlannedPoint, scientific

_HEAD = '''\
# SPDX-License-Identifier: Apache-2.0
"""{doc}
"""

from moejax.sweep import Sweep


def get_sweep():
  return Sweep(
    config={config},
    points={{
'''


def require_writable(path: Path) -> None:
  """Checks where a sweep file shall be written, before points are planned.

  Raises:
    ConfigError: not a name of a Python file, or something that is there.
  """
  if path.suffix != ".py":
    raise ConfigError(
      f"--write={path}: moejax sweep reads Python; use {path.stem}.py"
    )
  if path.exists():
    raise ConfigError(
      f"--write={path} is there already; delete it or use another name"
    )


def write_sweep(
  path: Path, points: list[PlannedPoint], config: str, overrides: Iterable[str]
) -> None:
  """Writes a file whose `get_sweep` returns the points, for one seed.

  Args:
    path: the file.
    points: of one config.
    config: `FILE.py[:ARG]` as the command line names it; the file names it as
      seen from its own folder.
    overrides: options that the command line set, which hold for all points.

  Raises:
    UserError: it cannot be written.
  """
  base = points[0].config
  common = {
    name: _value(base, name)
    for name in overrides
    if name != "seed" and name not in points[0].options
  }
  text = _HEAD.format(
    doc=_docstring(points, config),
    config=_literal(_seen_from(path.parent, config)),
  )
  for point in points:
    text += textwrap.indent(
      f"# {format_count(point.active_params)} active parameters, "
      f"{format_count(point.tokens)} tokens, {scientific(point.flops)} FLOPs\n"
      f"{_literal(point.name)}: {{\n{_entries(point.options)}}},\n",
      " " * 6,
    )
  text += "    },\n"
  if common:
    text += textwrap.indent(f"common={{\n{_entries(common)}}},\n", " " * 4)
  text += f"    seeds=({base.seed},),\n  )\n"
  try:
    write_atomically(path, text)
  except OSError as e:
    raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def _value(config: Config, path: str) -> Any:
  """An option by its dotted path."""
  value: Any = config.to_dict()
  for name in path.split("."):
    value = value[name]
  return value


def _docstring(points: list[PlannedPoint], config: str) -> str:
  name = Path(config).name
  budgets = len({point.budget for point in points})
  what = f"IsoFLOP points of {name}: {len(points) // budgets} sizes x {budgets}"
  more = (
    "Points of one budget have the same training FLOPs. Train them with moejax "
    "sweep, then give the runs' folders to moejax scaling fit."
  )
  return f"{what} budgets.\n\n{textwrap.fill(more, 80)}"


def _seen_from(folder: Path, config: str) -> str:
  """The config's path from the folder, links in either being followed."""
  file, colon, arg = config.partition(":")
  real = Path(file).parent.resolve() / Path(file).name
  return os.path.relpath(real, folder.resolve()) + colon + arg


def _entries(options: Mapping[str, Any]) -> str:
  return "".join(
    f"  {_literal(name)}: {_literal(value)},\n"
    for name, value in options.items()
  )


def _literal(value: Any) -> str:
  """As Python writes it, strings in double quotes."""
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  if isinstance(value, (tuple, list)):
    inside = ", ".join(map(_literal, value))
    return f"({inside}{',' * (len(value) == 1)})"
  return repr(value)
