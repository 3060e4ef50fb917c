# SPDX-License-Identifier: Apache-2.0
"""Options by their path: defaults, text of a command line, differences."""

import dataclasses
import difflib
import itertools
import json
import math
import types
import typing
from typing import Any

import ml_collections

from moejax.config.experiment import Config
from moejax.config.fields import LARGEST
from moejax.config.train import PhaseConfig
from moejax.errors import ConfigError


def default_config() -> ml_collections.ConfigDict:
  """All options at their defaults, as a locked ConfigDict to edit."""
  config = ml_collections.ConfigDict(_defaults(Config))
  return config.lock()


def _defaults(cls: type) -> dict[str, Any]:
  """Default values of a schema class without its cross-checks."""
  values = {}
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      values[field.name] = _defaults(field.type)
    else:
      values[field.name] = field.default
  return values


def set_option(config: ml_collections.ConfigDict, path: str, text: str) -> None:
  """Sets `path` (dotted) of a ConfigDict from command-line text.

  The schema gives the type, so `1e-3`, `true`, `3,4` and `none` mean what the
  option needs and nothing else.
  """
  set_value(config, path, _parse_text(option_at(path).type, text, path))


def set_value(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
  """Sets `path` (dotted) of a ConfigDict, if the value has the option's type.

  Raises:
    ConfigError: no such option, or another type.
  """
  value = check_type(option_at(path).type, value, path)
  *parents, name = path.split(".")
  for parent in parents:
    config = config[parent]
  config[name] = value


def option_at(path: str) -> dataclasses.Field:
  """The option's field of the schema.

  Raises:
    ConfigError: there is none of this name, or it is a section.
  """
  cls: type = Config
  *parents, name = path.split(".")
  for depth, parent in enumerate(parents):
    cls = _field(cls, parent, ".".join(parents[:depth])).type
    if not dataclasses.is_dataclass(cls):
      raise ConfigError(f"{path}: {parent} is an option, not a section")
  field = _field(cls, name, ".".join(parents))
  if dataclasses.is_dataclass(field.type):
    raise ConfigError(f"{path} is a section; set {path}.<option>=<value>")
  return field


def describe_options(cls: type = Config, prefix: str = "") -> list[str]:
  """One line an option, `name=default  meaning`, for `--help`."""
  lines = []
  for field in dataclasses.fields(cls):
    path = prefix + field.name
    if dataclasses.is_dataclass(field.type):
      lines += describe_options(field.type, path + ".")
    else:
      lines.append(f"{path}={field.default!r}  {field.metadata['doc']}")
  return lines


def differences(
  old: typing.Mapping[str, Any], new: typing.Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """`key: old -> new` for each leaf that differs between two config dicts."""
  lines = []
  for key in sorted({*old, *new}):
    path = prefix + key
    if key not in old or key not in new:
      lines.append(f"{path}: {'added' if key not in old else 'removed'}")
    elif isinstance(old[key], typing.Mapping):
      lines += differences(old[key], new[key], path + ".")
    elif _plain(old[key]) != _plain(new[key]):
      lines.append(f"{path}: {_plain(old[key])!r} -> {_plain(new[key])!r}")
  return lines


def _plain(value: Any) -> Any:
  """JSON has no tuples: compare both spellings alike."""
  if isinstance(value, typing.Mapping):
    return {key: _plain(part) for key, part in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(part) for part in value]
  return value


def _field(cls: type, name: str, where: str) -> dataclasses.Field:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if name in fields:
    return fields[name]
  dotted = f"{where}.{name}" if where else name
  everywhere = [line.split("=")[0] for line in describe_options()]
  near = difflib.get_close_matches(name, fields, 1) or [
    path for path in everywhere if path.split(".")[-1] == name
  ]
  if not near:
    raise ConfigError(
      f"no option {dotted!r}; {where or 'config'} has {', '.join(fields)}"
    )
  best = f"{where}.{near[0]}" if where and near[0] in fields else near[0]
  raise ConfigError(f"no option {dotted!r}; did you mean {best!r}?")


def build_section(cls: type, values: Any, where: str) -> Any:
  if not isinstance(values, (typing.Mapping, ml_collections.ConfigDict)):
    raise ConfigError(f"{where or 'a config'} is a section, got {values!r}")
  kwargs = {}
  for name in values:
    field = _field(cls, name, where)
    path = f"{where}.{name}" if where else name
    if dataclasses.is_dataclass(field.type):
      kwargs[name] = build_section(field.type, values[name], path)
    else:
      kwargs[name] = check_type(field.type, values[name], path)
  return cls(**kwargs)


def check_type(kind: Any, value: Any, path: str) -> Any:
  if isinstance(kind, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f"{path}={value!r} must be a tuple, e.g. ({value!r},)")
    element = typing.get_args(kind)[0]
    if element is PhaseConfig:
      found = [PhaseConfig.from_value(v, f"{path}[{i}]")
               for i, v in enumerate(value)]  # fmt: skip
      return tuple(found)
    if dataclasses.is_dataclass(element):
      found = [v if isinstance(v, element)
               else build_section(element, v, f"{path}[{i}]")
               for i, v in enumerate(value)]  # fmt: skip
      return tuple(found)
    return tuple(check_type(element, v, path) for v in value)
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{path}={value!r} must be {kind.__name__}, not {type(value).__name__}"
    )
  if kind is float and not math.isfinite(value):
    raise ConfigError(f"{path}={value!r} must be a finite number")
  if kind is int and abs(value) > LARGEST:
    raise ConfigError(f"{path}={value} is beyond {LARGEST}")
  return value


def _parse_text(kind: Any, text: str, path: str) -> Any:
  if isinstance(kind, types.GenericAlias):
    element = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(element):
      return check_type(kind, _parse_json_list(text, path), path)
    parts = [part.strip(" '\"") for part in _inside(text).split(",")]
    return tuple(_parse_text(element, p, path) for p in parts if p)
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise ConfigError(f"{path}={text!r} must be true or false")
    return text.lower() == "true"
  try:
    return kind(text)
  except ValueError:
    raise ConfigError(f"{path}={text!r} must be {kind.__name__}") from None


def _inside(text: str) -> str:
  """What is in the brackets of a whole list; those of a pattern stay."""
  text = text.strip()
  for first, last in ("()", "[]"):
    if text.startswith(first) and text.endswith(last):
      depths = itertools.accumulate(
        (c == first) - (c == last) for c in text[1:-1]
      )
      return text[1:-1] if min(depths, default=0) >= 0 else text
  return text


def _parse_json_list(text: str, path: str) -> Any:
  """Dictionaries, as config.json has them."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ConfigError(
      f"{path} must be a JSON list of dictionaries, such as "
      f'[{{"name": "first", ...}}, {{"name": "second", ...}}]: {e}'
    ) from None
