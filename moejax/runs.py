# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what lies where, and loading a model from it.

config.json   the resolved config, versions, git commit, sizes
tokenizer.*   the tokenizer it was trained with
checkpoints/  one folder a step
*.jsonl, events/, report/   logs and pictures
"""

import dataclasses
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath

from moejax import storage
from moejax.checkpoint import Checkpointer, CheckpointReader
from moejax.config import (
  Config,
  ParallelConfig,
  config_after,
  phases_of,
)
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import CheckpointError, ConfigError, DataError, UserError
from moejax.files import write_atomically
from moejax.hardware import keep_freed_memory, keep_programs
from moejax.models import (
  Transformer,
  Variables,
  build,
  count,
  init_variables,
  train_flops_per_token,
)
from moejax.models.transformer import boxed_variables
from moejax.parallel import build_on_mesh, make_mesh, shardings
from moejax.routing import home_of, resolve
from moejax.run_files import CHECKPOINTS, RunFiles, fetched

EMA = "ema"  # the item of a checkpoint that has averaged parameters
PACKAGES = (
  "moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
  "tensorflow-datasets", "ml-collections", "tokenizers", "numpy", "scipy",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to use."""

  config: Config
  model: Transformer
  variables: Variables
  tokenizer: Tokenizer
  step: int


def checkpoint_folder(workdir: str | os.PathLike) -> Path | epath.Path:
  """Of a run's folder or address."""
  found = storage.address(workdir)
  return (epath.Path(found) if found else Path(workdir)) / CHECKPOINTS


def origin_of(workdir: str | os.PathLike) -> str:
  """What to call a run elsewhere: its address, or the folder's whole path."""
  return storage.address(workdir) or os.path.abspath(workdir)


def load_run(
  workdir: str | os.PathLike,
  step: int | None = None,
  parallel: ParallelConfig | None = None,
  ema: bool = False,
) -> Run:
  """The model of a run's newest valid checkpoint, or of the one at `step`.

  Args:
    workdir: folder of the run.
    step: of the checkpoint.
    parallel: the mesh to put it on, whatever it was trained on; None is one
      device. The config that comes back has it, and a batch of a row a part;
      it is that of the checkpoint's phase.
    ema: take the moving average of the weights.

  Raises:
    ConfigError: a mesh that does not fit the devices or the model.
    DataError: no run in this folder.
    CheckpointError: no checkpoint, or none that is undamaged, or a tokenizer
      that is not the one it was trained with.
  """
  keep_freed_memory()
  keep_programs()
  of_run = read_config(workdir)
  config = phases_of(of_run)[0].config  # phases differ in no shape
  if parallel is None:
    abstract = abstract_variables(build(config.model))
  else:
    mesh = make_mesh(parallel)
    model = build_on_mesh(_on_mesh(config, parallel), mesh)
    abstract = _abstract_on_mesh(model, mesh)
  checkpoints = CheckpointReader(checkpoint_folder(workdir))
  if ema:
    require_average(of_run, workdir)
    abstract = {EMA if k == "params" else k: v for k, v in abstract.items()}
  restored = checkpoints.restore_params(abstract, step)
  variables = {
    "params" if k == EMA else k: v for k, v in restored.state.items()
  }
  tokenizer = read_tokenizer(workdir, restored.meta)
  config = config_after(of_run, restored.step)
  if parallel is None:
    model = build(config.model)
  else:
    config = _on_mesh(config, parallel)
    model = build_on_mesh(config, mesh)
  return Run(config, model, variables, tokenizer, restored.step)


def require_average(config: Config, workdir: str | os.PathLike) -> None:
  """Refuses `--ema` of a run that keeps no average."""
  if not config.optimizer.ema:
    raise ConfigError(
      f"{workdir} keeps no average of its weights (optimizer.ema is 0); leave "
      "--ema out"
    )


def _on_mesh(config: Config, parallel: ParallelConfig) -> Config:
  """The config with another mesh, and a batch that divides into its parts."""
  batch = dataclasses.replace(
    config.train, batch_size=parallel.batch_parts, accumulation_steps=1
  )
  return dataclasses.replace(
    config, parallel=parallel, train=batch,
    eval=dataclasses.replace(config.eval, batch_size=0),
  )  # fmt: skip


def _abstract_on_mesh(model: Transformer, mesh: jax.sharding.Mesh) -> Variables:
  shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes, shardings(mesh, boxed_variables(model)),
  )  # fmt: skip


def read_tokenizer(
  workdir: str | os.PathLike, meta: dict[str, Any] | None = None
) -> Tokenizer:
  """The tokenizer in the folder of a run.

  Raises:
    CheckpointError: it is not that of the checkpoint whose JSON is `meta`.
  """
  tokenizer = load_tokenizer(fetched(workdir))
  if meta is not None and meta["tokenizer"] != tokenizer.digest:
    raise CheckpointError(
      f"the tokenizer in {workdir} (sha256 {tokenizer.digest[:12]}) is not the "
      f"one step {meta['step']} was trained with ({meta['tokenizer'][:12]}); "
      "put that file back"
    )
  return tokenizer


def open_checkpoints(config: Config, files: RunFiles) -> Checkpointer:
  """The writer of a run's checkpoints, which must hold the run's files."""
  c = config.checkpoint
  return Checkpointer(
    checkpoint_folder(files.workdir),
    c.keep_last,
    c.keep_every,
    files.send,
    c.timeout,
    files.require_held,
  )


def abstract_variables(model: Transformer) -> Variables:
  """Shapes, dtypes and (one-device) shardings of a model's variables."""
  return on_device(
    jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  )


def on_device(abstract: Any) -> Any:
  """The abstract tree, placed whole on this process's first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
  )


def read_config(workdir: str | os.PathLike) -> Config:
  """The config that the run in this folder was started with."""
  folder = fetched(workdir)
  path = folder / "config.json"
  try:
    record = json.loads(path.read_text())
    config = Config.from_dict(record["config"])
    _require_trusted(config, folder, record["router_home"])
    return config
  except FileNotFoundError:
    raise DataError(
      f"{workdir} is not the folder of a run: it has no config.json; start one "
      "with moejax train --config=... --workdir=..."
    ) from None
  except ConfigError as e:
    raise ConfigError(f"{path}: {e}") from e
  except (KeyError, TypeError, UnicodeDecodeError, OSError) as e:
    raise DataError(f"{path} cannot be read: {e!r}") from e
  except (ValueError, RecursionError) as e:
    raise DataError(f"{path} is damaged: {e}") from e


def _require_trusted(config: Config, workdir: Path, home: str | None) -> None:
  """Code of one's own comes from where Python looks, as for any import.

  What a run's folder names or holds is data: it adds no folder to that, and no
  code in it is run.

  Raises:
    ConfigError: a router that is not to be found, or a router or task that lies
      in the run's folder.
  """
  router = config.model.moe.router_spec.name
  tasks = [entry.task_spec.name for entry in config.eval.sets if entry.task]
  for name in (router, *tasks):
    package, *inner, _ = name.split(".") if "." in name else ("", "")
    if package in ("", "__main__"):
      continue
    spec = importlib.util.find_spec(package)
    if spec is None and name == router:
      raise ConfigError(
        f"the router {name} cannot be imported from here; if you trust the "
        "code that the run was trained with, start in its folder, or with "
        f"PYTHONPATH={home or 'FOLDER'}"
      )
    if spec is not None and _lies_in(spec, inner, workdir.resolve()):
      raise ConfigError(
        f"{name} lies in the run's own folder, from which no code is run; if "
        "you trust it, move it elsewhere and start there"
      )


def _lies_in(
  spec: importlib.machinery.ModuleSpec, inner: list[str], folder: Path
) -> bool:
  """Whether a module of a package does, which is not imported for that."""
  found = spec.submodule_search_locations or [spec.origin or ""]
  places = [Path(place, *inner).resolve() for place in found]
  return any(folder in (place, *place.parents) for place in places)


def write_files(
  workdir: str | os.PathLike, config: Config, tokenizer: Tokenizer
) -> None:
  """Writes config.json and the tokenizer, each whole or not at all.

  Raises:
    UserError: the folder cannot be written, or the disk is full.
  """
  try:
    tokenizer.save(workdir)
    text = json.dumps(_record(config), indent=2) + "\n"
    write_atomically(Path(workdir) / "config.json", text)
  except OSError as e:
    raise UserError(
      f"cannot write {e.filename or workdir}: {e.strerror or e}"
    ) from e


def _record(config: Config) -> dict[str, Any]:
  counts = count(config.model)
  return {
    "config": config.to_dict(),
    "router_home": home_of(resolve(config.model.moe.router_spec)),
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
