# SPDX-License-Identifier: Apache-2.0
"""What all commands share: reading `--config=FILE[:arg]` and its overrides."""

import argparse
import importlib.machinery
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

import ml_collections

from moejax import config as config_lib
from moejax.errors import ConfigError


def add_config_arguments(
  parser: argparse.ArgumentParser, required: bool = True
) -> None:
  """Adds `--config`; overrides are left over and go to `parse_config`."""
  parser.add_argument(
    "--config", required=required, metavar="FILE.py[:ARG]",
    help="config file; its get_config(ARG) returns the experiment. "
    "Override single options with --config.SECTION.OPTION=VALUE",
  )  # fmt: skip
  parser.epilog = (
    "Options of a config: moejax train --help-config lists them all."
  )


def parse_config(path: str, extra_args: list[str]) -> config_lib.Config:
  """Reads the config file, applies the overrides, checks the whole.

  Args:
    path: `FILE.py` or `FILE.py:arg`.
    extra_args: leftover arguments, each `--config.a.b=value` (or two words).

  Raises:
    ConfigError: a missing file, an unknown key, a wrong type or impossible
      values; one line that names the key and the fix.
  """
  config = load_config_file(path)
  apply_overrides(config, extra_args)
  return config_lib.Config.from_dict(config)


def load_config_file(path: str) -> ml_collections.ConfigDict:
  """The ConfigDict that `get_config` of the file returns."""
  filename = path.partition(":")[0]
  if not os.path.isfile(filename):
    raise ConfigError(f"no config file {filename!r}; see configs/ for examples")
  _, config = call_in_file(path, "get_config")
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f"{filename}: get_config returned {type(config).__name__}, not the "
      "ConfigDict of default_config(); is there a `return config`?"
    )
  return config


def call_in_file(path: str, function: str) -> tuple[types.ModuleType, Any]:
  """Runs a Python file and calls a function of it.

  Args:
    path: `FILE.py` or `FILE.py:arg`; its folder becomes importable.
    function: its name; called with `arg`, if there is one.

  Returns:
    The module, and what the function returned.

  Raises:
    ConfigError: whatever goes wrong in the file, with its line.
  """
  filename, _, arg = path.partition(":")
  make_importable(os.path.dirname(os.path.abspath(filename)))
  name = re.sub(r"\W", "_", os.path.splitext(os.path.basename(filename))[0])
  loader = importlib.machinery.SourceFileLoader(f"config_{name}", filename)
  module = types.ModuleType(loader.name)
  module.__file__ = filename
  try:
    loader.exec_module(module)
    if not hasattr(module, function):
      raise ConfigError(f"there is no function {function} in it")
    call = getattr(module, function)
    return module, call(arg) if arg else call()
  except SyntaxError as e:
    raise ConfigError(f"{filename}, line {e.lineno}: {e.msg}") from e
  except Exception as e:  # whatever a person's code may raise
    raise ConfigError(f"{filename}{_line(e, filename)}: {_explain(e)}") from e


def apply_overrides(
  config: ml_collections.ConfigDict, extra_args: Sequence[str]
) -> None:
  """Applies `--config.a.b=value` arguments in order."""
  for path, text in parse_overrides(extra_args).items():
    config_lib.set_option(config, path, text)


def parse_overrides(extra_args: Sequence[str]) -> dict[str, str]:
  """`--config.a.b=value` arguments, each one word or two, by option.

  Raises:
    ConfigError: an argument of another form.
  """
  found = {}
  rest = list(extra_args)
  while rest:
    arg = rest.pop(0)
    match = re.fullmatch(r"--config\.([\w.]+)(?:=(.*))?", arg, re.DOTALL)
    if not match:
      raise ConfigError(
        f"unknown argument {arg!r}; config options are written "
        "--config.SECTION.OPTION=VALUE"
      )
    path, value = match.groups()
    if value is None:
      if not rest:
        raise ConfigError(f"--config.{path} has no value")
      value = rest.pop(0)
    found[path] = value
  return found


def whole_number(text: str) -> int:
  """`10000`, `1e4` or `2.5e6` of a command line, as an argument's `type`.

  Raises:
    ArgumentTypeError: it is no number, or no whole one.
  """
  try:
    return int(text)  # of any length, which a float would round
  except ValueError:
    pass
  try:
    number = float(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
  if not number.is_integer():
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
  return int(number)


def make_importable(folder: str) -> None:
  """Routers may live beside the config or in the working directory."""
  for path in (folder, os.getcwd()):
    if path not in sys.path:
      sys.path.append(path)


def _line(error: Exception, filename: str) -> str:
  """Where in the file it went wrong, if it did there."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == filename]
  return f", line {lines[-1]}" if lines else ""


def _explain(error: Exception) -> str:
  """The first line of ConfigDict's messages, without its dump of all keys."""
  text = str(error.args[0]) if error.args else type(error).__name__
  match = re.search(r'Key "(\w+)" does not exist', text)
  if match:
    near = re.search(r'Did you mean "(\w+)"', text)
    hint = f"; did you mean {near[1]!r}?" if near else ""
    return f"no option {match[1]!r}{hint}"
  known = (ConfigError, AttributeError, KeyError, TypeError, ValueError)
  prefix = "" if isinstance(error, known) else f"{type(error).__name__}: "
  return prefix + text.split("\n")[0]
