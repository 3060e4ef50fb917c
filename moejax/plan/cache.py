# SPDX-License-Identifier: Apache-2.0
"""Plans that were made before: compiling one takes a minute or more."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from moejax.config import Config
from moejax.files import cache_folder
from moejax.plan.apart import Crashed, run_apart
from moejax.plan.compiled import DoesNotFit, Memory, Plan, plan
from moejax.plan.roofline import Roofline, Traffic
from moejax.plan.topology import compiler_of
from moejax.routing import resolve
from moejax.routing.base import code_of


class CompilerAborts(DoesNotFit):
  """Not for want of memory, as far as is known."""


def cached_plan(config: Config, topology: str, fresh: bool = False) -> Plan:
  """`plan`, or what it said before of the same config, code and compiler.

  Args:
    config, topology: as `plan`'s.
    fresh: compile in any case.

  Raises:
    As `plan`; a refusal is remembered too.
  """
  path = cache_folder("plans") / f"{_key(config, topology)}.json"
  if not fresh and (found := _read(path)) is not None:
    if "refused" in found:
      raise DoesNotFit(found["refused"])
    return _from_json(found)
  try:
    made = run_apart(plan, config, topology)
  except DoesNotFit as e:
    _write(path, {"refused": str(e)})
    raise
  except Crashed:
    raise CompilerAborts(
      f"the compiler for {topology} aborts on this step; "
      "config.parallel.overlap=other asks less of it"
    ) from None
  _write(path, dataclasses.asdict(made))
  return made


def _key(config: Config, topology: str) -> str:
  """Of all that the answer depends on."""
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
  versions.append(compiler_of(topology))
  code = hashlib.sha256()
  for file in sorted(Path(__file__).parents[1].rglob("*.py")):
    code.update(file.read_bytes())
  # A router of one's own, and what the compilers are told beside.
  router = code_of(resolve(config.model.moe.router_spec))
  if router is not None and Path(router.co_filename).is_file():
    code.update(Path(router.co_filename).read_bytes())
  flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
  asked = [
    dataclasses.asdict(config), topology, versions, code.hexdigest(), flags
  ]  # fmt: skip
  text = json.dumps(asked, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):  # none, or half of one
    return None


def _write(path: Path, answer: dict[str, Any]) -> None:
  """A plan that cannot be kept is still a plan."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(answer))
    whole.replace(path)
  except OSError:
    pass


def _from_json(found: dict[str, Any]) -> Plan:
  line = found["roofline"]
  traffic = tuple(
    Traffic(**(t | {"axes": tuple(t["axes"])})) for t in line["traffic"]
  )
  line = line | {"traffic": traffic, "unknown": tuple(line["unknown"])}
  return Plan(**(found | {
    "memory": Memory(**found["memory"]), "roofline": Roofline(**line),
  }))  # fmt: skip
