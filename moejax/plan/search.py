# SPDX-License-Identifier: Apache-2.0
"""Which mesh, and how much to compute again: found by compiling."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

from moejax.config import Config, ParallelConfig
from moejax.errors import ConfigError
from moejax.plan.cache import cached_plan
from moejax.plan.compiled import DoesNotFit, Plan
from moejax.plan.report import HEADER, mesh_name, summary
from moejax.plan.topology import devices_of

REMATS = ("full", "exchange", "experts", "dots", "none")
_BEST = 2  # meshes for which other remat policies are tried
_GIVE_UP = 2  # sizes of an axis in a row that were slower than the best
_COPIES = (2, 4, 8, 16, 32)


def search(
  config: Config, topology: str, fresh: bool = False
) -> list[tuple[Config, Plan]]:
  """Plans of the meshes worth a try, the fastest first; prints as it goes.

  With full remat, which takes least memory: first more and more of the devices
  on `expert`, the others on `fsdp`; then copies of the best (`data`), which
  gather from fewer devices. Each until it gets slower. Then, for the fastest,
  the policies that compute less again.

  Args:
    config: its `parallel` sizes and `model.remat` are varied, all else stays.
    topology: such as `v5p:4x4x4`.
    fresh: do not take plans made before.

  Raises:
    ConfigError: no mesh of that many devices is possible.
  """
  found, size = [], len(devices_of(topology))
  meshes = list(candidates(config, size))
  if not meshes:
    raise ConfigError(
      f"no mesh of {size} devices divides batch_size="
      f"{config.train.batch_size} and the model; use another batch size"
    )
  print(f"{len(meshes)} meshes or more, a minute or more each", flush=True)
  print(HEADER, flush=True)

  def attempt(candidate: Config) -> float:
    """Seconds of a step; infinite if it does not fit."""
    try:
      made = cached_plan(candidate, topology, fresh)
    except DoesNotFit as e:
      line = f"{mesh_name(candidate):34} {candidate.model.remat:10} "
      print(line + "does not fit: " + _sizes(str(e)), flush=True)
      return math.inf
    found.append((candidate, made))
    print(summary(candidate, made), flush=True)
    return made.roofline.seconds

  def climb(meshes: Iterable[ParallelConfig], to_beat: float) -> None:
    worse = 0
    for parallel in meshes:
      seconds = attempt(_with(config, parallel, "full"))
      worse = 0 if seconds < to_beat else worse + 1
      to_beat = min(to_beat, seconds)
      if math.isfinite(to_beat) and worse == _GIVE_UP:
        return

  climb(meshes, math.inf)
  if found:
    fastest = min(found, key=_seconds)
    climb(_copies(config, fastest[0].parallel), _seconds(fastest))
  best = sorted(found, key=_seconds)[:_BEST]
  for (candidate, _), remat in itertools.product(best, REMATS[1:]):
    attempt(_with(config, candidate.parallel, remat))
  return sorted(found, key=_seconds)


def candidates(config: Config, size: int) -> Iterator[ParallelConfig]:
  """Meshes of `size` devices that the config allows.

  The batch goes over `fsdp`, and over `expert` in all sizes that divide the
  experts; `tensor` or `sequence` where the batch has too few rows for that.
  """
  rows = config.train.batch_size // config.train.accumulation_steps
  for split in _divisors(size):
    if rows % (size // split) == 0:
      break
  for axis in ("tensor", "sequence") if split > 1 else ("tensor",):
    for expert in _divisors(size // split):
      sizes = {
        "data": 1, "fsdp": size // split // expert, "expert": expert,
        "tensor": 1, "sequence": 1, axis: split,
      }  # fmt: skip
      parallel = dataclasses.replace(config.parallel, **sizes)
      if _allowed(config, parallel):
        yield parallel


def _copies(
  config: Config, parallel: ParallelConfig
) -> Iterator[ParallelConfig]:
  """The same with more and more copies of the parameters."""
  for data in _COPIES:
    if parallel.fsdp % data == 0 and parallel.fsdp > data:
      split = dataclasses.replace(
        parallel, data=data, fsdp=parallel.fsdp // data
      )
      if _allowed(config, split):
        yield split


def _allowed(config: Config, parallel: ParallelConfig) -> bool:
  try:
    dataclasses.replace(config, parallel=parallel)
  except ConfigError:
    return False
  return True


def _with(config: Config, parallel: ParallelConfig, remat: str) -> Config:
  model = dataclasses.replace(config.model, remat=remat)
  return dataclasses.replace(config, parallel=parallel, model=model)


def _seconds(found: tuple[Config, Plan]) -> float:
  return found[1].roofline.seconds


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def _sizes(message: str) -> str:
  """The compiler's own words on memory."""
  start = message.find("Used ")
  return message[start:].split(";")[0][:60] if start >= 0 else message[:60]
