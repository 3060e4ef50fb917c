# SPDX-License-Identifier: Apache-2.0
"""Every option of an experiment: its name, type, default, meaning and limits.

This is the one place where options live. `default_config()` turns the schema
into a locked `ConfigDict` that config files edit; `Config.from_dict` turns the
edited one back into frozen dataclasses, checking each value and all relations
once. Code below this boundary reads plain attributes and never a default.
"""

from moejax.config.data import DataConfig
from moejax.config.experiment import (
  Config,
  Phase,
  config_after,
  phase_at,
  phases_of,
  require_mesh_fits,
  schedule_stretches,
)
from moejax.config.fields import (
  require,
  require_choice,
  require_positive,
)
from moejax.config.model import (
  ROPE_SCALINGS,
  LayerConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
)
from moejax.config.optimizer import (
  LossConfig,
  OptimizerConfig,
  ScheduleConfig,
  StabilityConfig,
)
from moejax.config.options import (
  default_config,
  describe_options,
  differences,
  option_at,
  set_option,
  set_value,
)
from moejax.config.runtime import (
  CheckpointConfig,
  EvalConfig,
  EvalSetConfig,
  ParallelConfig,
)
from moejax.config.train import (
  PHASE_OPTIONS,
  PhaseConfig,
  TrainConfig,
)

__all__ = [
  "CheckpointConfig",
  "Config",
  "DataConfig",
  "EvalConfig",
  "EvalSetConfig",
  "LayerConfig",
  "LossConfig",
  "MLAConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "PHASE_OPTIONS",
  "ParallelConfig",
  "Phase",
  "PhaseConfig",
  "ROPE_SCALINGS",
  "ScheduleConfig",
  "StabilityConfig",
  "TrainConfig",
  "config_after",
  "default_config",
  "describe_options",
  "differences",
  "option_at",
  "phase_at",
  "phases_of",
  "require",
  "require_choice",
  "require_mesh_fits",
  "require_positive",
  "schedule_stretches",
  "set_option",
  "set_value",
]
