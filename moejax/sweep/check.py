# SPDX-License-Identifier: Apache-2.0
"""Whether the points of a sweep can be built, before the first one runs."""

from moejax import data as data_lib
from moejax import runs
from moejax.config import Config
from moejax.errors import UserError
from moejax.models import build
from moejax.models.transformer import boxed_variables
from moejax.progress import progress_bar
from moejax.sweep.spec import PlannedRun, raise_wrong_points
from moejax.train import load_tokenizer_of


def check_points(planned: list[PlannedRun]) -> None:
  """Traces each point's model, router included, and opens its data.

  Raises:
    ConfigError: naming every point that cannot be built.
  """
  by_point = {run.point: run.config for run in planned}
  wrong = {}
  opened: set[str] = set()
  with progress_bar("checking points", len(by_point)) as bar:
    for point, config in by_point.items():
      try:
        boxed_variables(build(config.model))
        if repr(config.data) not in opened:
          _open_data(config)
          opened.add(repr(config.data))
        if config.train.init_from:
          runs.read_config(config.train.init_from)
      except UserError as e:
        wrong[point] = str(e)
      bar.advance()
  raise_wrong_points(wrong)


def _open_data(config: Config) -> None:
  data_lib.open_stores(config.data, load_tokenizer_of(config))
