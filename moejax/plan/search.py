# SPDX-License-Identifier: Apache-2.0
"""Which mesh, and how much to compute again: found by compiling."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from jax.sharding import AbstractMesh

from moejax.config import Config, ParallelConfig
from moejax.errors import ConfigError
from moejax.models import build
from moejax.models.transformer import boxed_variables
from moejax.parallel import shardings
from moejax.plan.cache import CompilerAborts, cached_plan
from moejax.plan.compiled import DoesNotFit, Plan
from moejax.plan.report import HEADER, mesh_name, summary
from moejax.plan.topology import devices_of, platform_of

REMATS = ("full", "exchange", "experts", "dots", "none")
ONE = dict.fromkeys(ParallelConfig.AXES, 1)
_BEST = 2  # meshes for which other remat policies are tried
_GIVE_UP = 2  # sizes of an axis in a row that were slower than the best


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
  size = len(devices_of(topology))
  meshes = list(candidates(config, size))
  if not meshes:
    plain = dataclasses.replace(config.parallel, **ONE | {"fsdp": size})
    raise ConfigError(
      f"no mesh of {size} devices divides batch_size="
      f"{config.train.batch_size} and the model; with fsdp={size}: "
      f"{_refusal_by(config)(plain)}"
    )
  print(
    f"{len(meshes)} meshes and copies of them, then remat policies: ten to "
    "twenty plans, a minute or more each",
    flush=True,
  )
  print(HEADER, flush=True)
  tries = _Tries(config, topology, fresh)
  for _, group in itertools.groupby(meshes, lambda mesh: mesh.sequence > 1):
    tries.climb(group, math.inf)
  if tries.found:
    fastest = tries.ranked()[0]
    copies = _copies(fastest[0].parallel, _refusal_by(config))
    tries.climb(itertools.islice(copies, 1, None), _seconds(fastest))
  for (candidate, _), remat in itertools.product(
    tries.ranked()[:_BEST], REMATS[1:]
  ):
    tries.attempt(candidate.parallel, remat)
  return tries.ranked()


@dataclasses.dataclass
class _Tries:
  """Plans so far; a line is printed for each."""

  config: Config
  topology: str
  fresh: bool
  found: list[tuple[Config, Plan]] = dataclasses.field(default_factory=list)

  def ranked(self) -> list[tuple[Config, Plan]]:
    return sorted(self.found, key=_seconds)

  def climb(self, meshes: Iterable[ParallelConfig], to_beat: float) -> None:
    """With full remat, until it gets slower."""
    worse = 0
    for parallel in meshes:
      seconds = self.attempt(parallel, "full")
      worse = 0 if seconds < to_beat else worse + 1
      to_beat = min(to_beat, seconds)
      if math.isfinite(to_beat) and worse == _GIVE_UP:
        return

  def attempt(self, parallel: ParallelConfig, remat: str) -> float:
    """Seconds of a step; infinite if it does not fit."""
    overlap = self.config.parallel.overlap
    parallel = dataclasses.replace(parallel, overlap=overlap)
    candidate = _with(self.config, parallel, remat)
    line = f"{mesh_name(candidate):34} {remat:10} "
    try:
      made = cached_plan(candidate, self.topology, self.fresh)
    except CompilerAborts as e:
      if overlap != "kernels" or platform_of(self.topology) != "tpu":
        print(line + str(e), flush=True)
        return math.inf
      # What one step of a model meets, the others do as a rule.
      print(line + "compiler aborts; from here on overlap=other", flush=True)
      parallel = dataclasses.replace(parallel, overlap="other")
      self.config = dataclasses.replace(self.config, parallel=parallel)
      return self.attempt(parallel, remat)
    except DoesNotFit as e:
      print(line + "does not fit: " + _sizes(str(e)), flush=True)
      return math.inf
    self.found.append((candidate, made))
    print(summary(candidate, made), flush=True)
    return made.roofline.seconds


def candidates(config: Config, size: int) -> Iterator[ParallelConfig]:
  """Meshes of `size` devices that the config allows.

  The batch goes over `fsdp`, and over `expert` in all sizes that divide the
  experts; over `data` in as few as leave an `fsdp` that the parameters divide
  by; `tensor` or `sequence` where the batch has too few rows for that.
  """
  rows = config.train.batch_size // config.train.accumulation_steps
  for split in _divisors(size):
    if rows % (size // split) == 0:
      break
  refusal = _refusal_by(config)
  for axis in ("tensor", "sequence") if split > 1 else ("tensor",):
    for expert in _divisors(size // split):
      sizes = {"fsdp": size // split // expert, "expert": expert, axis: split}
      whole = dataclasses.replace(config.parallel, **ONE | sizes)
      yield from itertools.islice(_copies(whole, refusal), 1)


def _copies(
  parallel: ParallelConfig, refusal: Callable[[ParallelConfig], str | None]
) -> Iterator[ParallelConfig]:
  """The same, and with more and more copies of the parameters."""
  for number in _divisors(parallel.fsdp):
    split = dataclasses.replace(
      parallel, data=parallel.data * number, fsdp=parallel.fsdp // number
    )
    if refusal(split) is None:
      yield split


def _refusal_by(config: Config) -> Callable[[ParallelConfig], str | None]:
  """Why a mesh cannot be: what of the batch or the model does not divide."""
  boxed = boxed_variables(build(config.model))

  def refusal(parallel: ParallelConfig) -> str | None:
    sizes = tuple(getattr(parallel, axis) for axis in ParallelConfig.AXES)
    try:
      dataclasses.replace(config, parallel=parallel)
      shardings(AbstractMesh(sizes, ParallelConfig.AXES), boxed)
    except ConfigError as e:
      return str(e)
    return None

  return refusal


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
