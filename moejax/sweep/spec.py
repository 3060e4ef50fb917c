# SPDX-License-Identifier: Apache-2.0
"""What a sweep file says: one config, and points that change it."""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.cli import (
  apply_overrides,
  call_in_file,
  load_config_file,
  parse_overrides,
)
from moejax.config import Config, set_value
from moejax.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]{0,99}")
# Files of the sweep's own folder, on disks that tell no capitals either.
_OWN_FILES = re.compile(
  r"index\.html|comparison\.(md|json)|array\.sbatch|.*\.png|slurm-.*\.log",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs of one config, each point with every seed.

    def get_sweep():
      return Sweep(
        config="configs/tiny.py",
        points={
          "top_k": {"model.moe.router": "top_k(k=2)"},
          "mine": {"model.moe.router": "my_router.route(k=2)"},
        },
        common={"train.num_steps": 300},
      )

  Attributes:
    config: `FILE.py[:ARG]`, seen from the sweep file's folder or from the
      working directory.
    points: for each point's name, options and their values.
    common: options of all points.
    seeds: values of `seed`. Points of one seed see the same batches, and start
      from the same weights as far as they have them.
    baseline: the point that others are compared with; "" takes the first.
    title: of the comparison; "" takes the first line of the file's docstring.
  """

  config: str
  points: Mapping[str, Mapping[str, Any]]
  common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: Sequence[int] = (0, 1)
  baseline: str = ""
  title: str = ""

  def __post_init__(self):
    if not isinstance(self.config, str):
      raise ConfigError(f"a sweep's config={self.config!r} must be a path")
    options = [self.points, self.common]
    if isinstance(self.points, Mapping):
      options += self.points.values()
    if not all(isinstance(values, Mapping) for values in options):
      raise ConfigError(
        "a sweep's points are a dictionary of dictionaries, "
        '{"name": {"option": value}}, and so is common'
      )
    whole = isinstance(self.seeds, Sequence) and all(
      type(seed) is int for seed in self.seeds
    )
    if not whole:
      raise ConfigError(f"seeds={self.seeds!r} are whole numbers: (0, 1, 2)")
    if not self.points or not self.seeds:
      raise ConfigError("a sweep needs at least one point and one seed")
    if any("seed" in values for values in options):
      raise ConfigError("points and common cannot set seed: give seeds")
    seen: dict[str, str] = {}
    for name in self.points:
      if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
          f"point {name!r} names a folder: letters, digits and _ . + = - only, "
          "at most 100"
        )
      if _OWN_FILES.fullmatch(name):
        raise ConfigError(f"point {name!r} is called as a file of the sweep is")
      if seen.setdefault(name.lower(), name) != name:
        raise ConfigError(
          f"points {seen[name.lower()]!r} and {name!r} are one folder on some "
          "disks; call one of them otherwise"
        )
    if len(set(self.seeds)) < len(self.seeds):
      raise ConfigError(f"seeds={tuple(self.seeds)} has one of them twice")
    if self.baseline and self.baseline not in self.points:
      raise ConfigError(
        f"baseline={self.baseline!r} is none of the points "
        f"{', '.join(self.points)}"
      )

  @property
  def reference(self) -> str:
    """The point that others are compared with."""
    return self.baseline or next(iter(self.points))


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One run of a sweep; `name` is its folder below the sweep's."""

  point: str
  seed: int
  config: Config

  @property
  def name(self) -> str:
    return run_name(self.point, self.seed)


def run_name(point: str, seed: int) -> str:
  """The folder of a run, below that of its sweep."""
  return f"{point}/seed_{seed}"


def grid(
  axes: Mapping[str, Sequence[Any] | Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Points of all combinations: `grid({"optimizer.eps": [1e-8, 1e-5]})`.

  Args:
    axes: for each option its values, or values by the names that points shall
      have; without names, a point is called `option=value`.

  Raises:
    ConfigError: two points of one name.
  """
  named = [
    [(label, option, value) for label, value in _labelled(option, values)]
    for option, values in axes.items()
  ]
  points: dict[str, dict[str, Any]] = {}
  for chosen in itertools.product(*named):
    name = "_".join(label for label, _, _ in chosen)
    if name in points:
      raise ConfigError(
        f"grid: two points are called {name!r}; name the values"
      )
    points[name] = {option: value for _, option, value in chosen}
  return points


def load_sweep(path: str) -> Sweep:
  """The Sweep that `get_sweep` of a file returns, path and title filled in.

  Args:
    path: `FILE.py` or `FILE.py:arg`.

  Raises:
    ConfigError: no such file, or whatever goes wrong in it.
  """
  filename = path.partition(":")[0]
  if not os.path.isfile(filename):
    raise ConfigError(
      f"no sweep file {filename!r}; see experiments/*/sweep.py for examples"
    )
  module, sweep = call_in_file(path, "get_sweep")
  if not isinstance(sweep, Sweep):
    raise ConfigError(
      f"{filename}: get_sweep returned {type(sweep).__name__}, not a "
      "moejax.sweep.Sweep; is there a `return`?"
    )
  beside = Path(filename).parent / sweep.config
  if beside.with_name(beside.name.partition(":")[0]).is_file():
    sweep = dataclasses.replace(sweep, config=str(beside))
  elif not Path(sweep.config.partition(":")[0]).is_file():
    raise ConfigError(
      f"{filename}: there is no config {sweep.config!r}, neither beside that "
      "file nor in the working directory"
    )
  if not sweep.title:
    first = (module.__doc__ or "").strip() or Path(filename).resolve().stem
    sweep = dataclasses.replace(sweep, title=first.splitlines()[0].rstrip("."))
  return sweep


def plan_runs(sweep: Sweep, extra_args: Sequence[str] = ()) -> list[PlannedRun]:
  """All runs of a sweep, seed by seed, each config built and checked.

  Args:
    sweep: from `load_sweep`.
    extra_args: `--config.a.b=value` for all of them.

  Raises:
    ConfigError: naming every point that is wrong.
  """
  _refuse_overrides(sweep, extra_args)
  runs, wrong = [], {}
  for seed, point in itertools.product(sweep.seeds, sweep.points):
    try:
      runs.append(
        PlannedRun(point, seed, _config(sweep, point, seed, extra_args))
      )
    except ConfigError as e:
      wrong[point] = str(e)
  raise_wrong_points(wrong)
  return runs


def _refuse_overrides(sweep: Sweep, extra_args: Sequence[str]) -> None:
  """Of options that points set: all of them would be the same."""
  for path in parse_overrides(extra_args):
    setting = [name for name, own in sweep.points.items() if path in own]
    if setting:
      more = f" and {len(setting) - 3} more" if len(setting) > 3 else ""
      raise ConfigError(
        f"--config.{path} would undo what {', '.join(setting[:3])}{more} set: "
        "change the sweep file"
      )


def raise_wrong_points(
  wrong: Mapping[str, str], cause: BaseException | None = None
) -> None:
  """One error for all points that cannot be built, if there are any."""
  if not wrong:
    return
  by_reason: dict[str, list[str]] = {}
  for point, said in wrong.items():
    by_reason.setdefault(said, []).append(point)
  lines = "; ".join(f"{', '.join(p)}: {said}" for said, p in by_reason.items())
  number = "a point" if len(wrong) == 1 else f"{len(wrong)} points"
  raise ConfigError(
    f"{number} cannot be built, nothing was started. {lines}"
  ) from cause


def _config(
  sweep: Sweep, point: str, seed: int, extra_args: Sequence[str]
) -> Config:
  if "seed" in parse_overrides(extra_args):
    raise ConfigError("--config.seed cannot be set for a sweep: give --seeds")
  config = load_config_file(sweep.config)
  for path, value in {**sweep.common, **sweep.points[point]}.items():
    set_value(config, path, value)
  apply_overrides(config, extra_args)
  set_value(config, "seed", seed)
  return Config.from_dict(config)


def _labelled(option: str, values: Any) -> list[tuple[str, Any]]:
  if isinstance(values, Mapping):
    return list(values.items())
  short = option.rpartition(".")[2]
  words = lambda value: "-".join(re.findall(r"[\w.+=-]+", str(value)))
  return [(f"{short}={words(value)}", value) for value in values]
