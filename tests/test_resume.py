# SPDX-License-Identifier: Apache-2.0
"""Which configs go on with a run; whole runs are in test_train.py."""

import dataclasses

import pytest

from moejax.config import Config
from moejax.errors import CheckpointError, ConfigError
from moejax.resume import check_same_run


def meta_of(config, step=100):
  return {"step": step, "config": config.to_dict()}


def test_an_option_that_came_to_be_since_has_its_default():
  meta = meta_of(Config())
  del meta["config"]["model"]["clip_qkv"]
  check_same_run(Config(), meta)
  model = dataclasses.replace(Config().model, clip_qkv=8.0)
  with pytest.raises(CheckpointError, match="model.clip_qkv: 0.0 -> 8.0"):
    check_same_run(Config(model=model), meta)


def test_an_option_that_is_no_more_is_named():
  meta = meta_of(Config())
  meta["config"]["model"]["soft_cap"] = 30.0
  with pytest.raises(ConfigError, match="no option 'model.soft_cap'"):
    check_same_run(Config(), meta)


def test_only_what_keeps_the_result_may_change():
  """Rows beyond receive_factor are dropped; max_skipped only ends a run."""
  meta = meta_of(Config())
  split = dataclasses.replace(Config().parallel, receive_factor=1.0)
  with pytest.raises(CheckpointError, match="parallel.receive_factor: 0.0"):
    check_same_run(Config(parallel=split), meta)
  stability = dataclasses.replace(Config().stability, max_skipped=99)
  check_same_run(Config(stability=stability), meta)
