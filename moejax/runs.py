# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what lies where, and loading a model from it.

config.json   the resolved config, versions, git commit, sizes
tokenizer.*   the tokenizer it was trained with
checkpoints/  one folder a step
*.jsonl, events/, report/   logs and pictures
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint import Checkpointer, CheckpointReader
from moejax.config import Config
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import CheckpointError, DataError
from moejax.hardware import keep_freed_memory
from moejax.models import (
  Transformer,
  build,
  count,
  init_params,
  train_flops_per_token,
)

PACKAGES = (
  "moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
  "tensorflow-datasets", "ml-collections", "tokenizers", "numpy", "scipy",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to use."""

  config: Config
  model: Transformer
  params: Any
  tokenizer: Tokenizer
  step: int


def checkpoint_folder(workdir: str | os.PathLike) -> Path:
  return Path(workdir) / "checkpoints"


def load_run(workdir: str | os.PathLike, step: int | None = None) -> Run:
  """The model of a run's newest valid checkpoint, or of the one at `step`.

  Raises:
    DataError: no run in this folder.
    CheckpointError: no checkpoint, or none that is undamaged, or a tokenizer
      that is not the one it was trained with.
  """
  keep_freed_memory()
  config = read_config(workdir)
  model = build(config.model)
  checkpoints = CheckpointReader(checkpoint_folder(workdir))
  restored = checkpoints.restore_params(
    {"params": abstract_params(model)}, step
  )
  tokenizer = load_tokenizer(Path(workdir))
  if restored.meta["tokenizer"] != tokenizer.digest:
    raise CheckpointError(
      f"the tokenizer in {workdir} (sha256 {tokenizer.digest[:12]}) is not the "
      f"one step {restored.step} was trained with "
      f"({restored.meta['tokenizer'][:12]}); put that file back"
    )
  return Run(config, model, restored.state["params"], tokenizer, restored.step)


def open_checkpoints(
  workdir: str | os.PathLike, config: Config
) -> Checkpointer:
  c = config.checkpoint
  return Checkpointer(
    checkpoint_folder(workdir), c.every, c.keep_last, c.keep_every
  )


def abstract_params(model: Transformer) -> Any:
  """Shapes, dtypes and (one-device) shardings of the parameters."""
  return on_device(
    jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  )


def on_device(abstract: Any) -> Any:
  """The abstract tree, placed whole on the first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
  )


def read_config(workdir: str | os.PathLike) -> Config:
  """The config that the run in this folder was started with."""
  path = Path(workdir) / "config.json"
  try:
    return Config.from_dict(json.loads(path.read_text())["config"])
  except FileNotFoundError:
    raise DataError(
      f"{workdir} is not the folder of a run: it has no config.json; start one "
      "with moejax train --config=... --workdir=..."
    ) from None
  except (json.JSONDecodeError, KeyError, OSError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e


def write_config(workdir: str | os.PathLike, config: Config) -> None:
  """Writes config.json whole or not at all."""
  counts = count(config.model)
  record = {
    "config": config.to_dict(),
    "versions": versions(),
    "git_commit": git_commit(),
    "num_params": counts.num_params,
    "num_active_params": counts.num_active_params,
    "flops_per_token": train_flops_per_token(config.model, config.data.seq_len),
    "run": {
      "platform": jax.default_backend(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
    },
  }
  path = Path(workdir) / "config.json"
  temporary = path.with_suffix(".json.tmp")
  temporary.write_text(json.dumps(record, indent=2) + "\n")
  os.replace(temporary, path)


def versions() -> dict[str, str]:
  """Installed versions of what decides the numbers."""
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found


def git_commit() -> str | None:
  """Commit of the code, with `-dirty` if it was changed; None outside git."""
  where = Path(__file__).parent
  command = ["git", "-C", str(where), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(
      [*command, "--abbrev=40", "--exclude=*"],
      capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
