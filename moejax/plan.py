# SPDX-License-Identifier: Apache-2.0
"""Whether a config fits on a pod: its real training step, compiled for it here.

The TPU compiler needs no TPU: the extra [plan] brings it to any machine.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Iterator

import jax

from moejax import cli
from moejax.config import Config
from moejax.errors import ConfigError, UserError
from moejax.hardware import peak_flops
from moejax.memory import device_bytes, lower_step
from moejax.models import build, train_flops_per_token
from moejax.parallel import build_on_mesh, make_mesh
from moejax.step import abstract_state, state_shardings

KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:8x8"
# What programs may use of a chip's memory, as its compiler says: GiB.
USABLE = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the compiler says of one training step, for each device.

  Attributes:
    devices: how many there are.
    kind: theirs.
    weights, moments: bytes of parameters, and of all other state.
    total: bytes at the peak, these included.
    seconds: that compiling took.
    flops: of the model, in a step; recomputation is not counted.
    peak: FLOP/s of a device; None where it is not known.
  """

  devices: int
  kind: str
  weights: int
  moments: int
  total: int
  seconds: float
  flops: float
  peak: float | None


def plan(config: Config, topology: str) -> Plan:
  """Compiles the training step of a config for a topology.

  Args:
    config: `parallel` must fit the topology's devices.
    topology: such as `v5p:4x4x4`.

  Raises:
    ConfigError: no such topology, or a mesh that does not fit it.
    UserError: there is no compiler here, or it finds that the step does not
      fit, and by how much.
  """
  devices = _devices(topology)
  mesh = make_mesh(config.parallel, devices)
  model = build_on_mesh(config, mesh, "tpu")
  plain = build(config.model, "tpu")
  state = abstract_state(config, plain, state_shardings(config, plain, mesh))
  begun = time.perf_counter()
  lowered = lower_step(config, model, state)
  try:
    stats = lowered.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as e:
    lines = [line for line in str(e).splitlines() if line.strip()]
    raise UserError(
      f"the compiler refuses this step on {topology}: {' '.join(lines[:2])}; "
      "split it further by config.parallel, raise train.accumulation_steps, "
      "or set model.remat=full"
    ) from e
  total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  total += stats.output_size_in_bytes - stats.alias_size_in_bytes
  return Plan(
    devices=len(devices),
    kind=devices[0].device_kind,
    weights=device_bytes(state.params),
    moments=device_bytes(state) - device_bytes(state.params),
    total=total,
    seconds=time.perf_counter() - begun,
    flops=_step_flops(config),
    peak=peak_flops(devices[0]),
  )


def describe(config: Config, found: Plan) -> str:
  """The plan as a table for people."""
  tokens = config.train.batch_size * config.data.seq_len
  axes = config.parallel.AXES
  sizes = {axis: getattr(config.parallel, axis) for axis in axes}
  mesh = ", ".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "none"
  rest = found.total - found.weights - found.moments
  rows = [
    ("devices", f"{found.devices} x {found.kind}; mesh: {mesh}"),
    ("tokens a step", f"{tokens:,}, {tokens // found.devices:,} a device"),
    ("weights", _gib(found.weights)),
    ("moments, state", _gib(found.moments)),
    ("activations, rest", _gib(rest)),
    ("a device needs", _gib(found.total) + _of(found.kind)),
  ]
  if found.peak:
    seconds = found.flops / found.devices / found.peak
    rows.append((
      "at peak FLOP/s",
      f"{seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s: no step is "
      "faster (MFU 1)",
    ))  # fmt: skip
  rows.append(("compiled in", f"{found.seconds:.0f} s"))
  return "\n".join(f"{name:20}{text}" for name, text in rows)


def _of(kind: str) -> str:
  if kind not in USABLE:
    return ""
  return f" of {USABLE[kind]} GiB: fits"  # else the compiler had refused it


def _step_flops(config: Config) -> float:
  tokens = config.train.batch_size * config.data.seq_len
  return tokens * train_flops_per_token(config.model, config.data.seq_len)


def _gib(size: float) -> str:
  return f"{size / _GIB:,.2f} GiB"


def _devices(topology: str) -> list:
  """The devices of a topology that is not here."""
  kind = topology.partition(":")[0]
  if kind not in KINDS or ":" not in topology:
    raise ConfigError(
      f"--topology={topology}: use KIND:SHAPE, such as {EXAMPLES}; kinds are "
      f"{', '.join(KINDS)}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "planning for TPUs needs their compiler: pip install -c constraints.txt "
      "-e '.[plan]'"
    )
  from jax.experimental import topologies

  # No chip is looked for, here or at a cloud's metadata server.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    with _quiet():
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
      )
  except Exception as e:  # the plugin has errors of several kinds
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    raise ConfigError(
      f"--topology={topology} is not known to the compiler: {reason}; such as "
      f"{EXAMPLES}"
    ) from e
  return list(found.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what libtpu prints of the chips that it does not find."""
  sys.stderr.flush()
  kept = os.dup(2)
  silent = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(silent, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(silent)
    os.close(kept)


def main(argv: list[str]) -> int:
  """`moejax plan --config=FILE --topology=v5p:4x4x4`."""
  parser = argparse.ArgumentParser(
    "moejax plan",
    description="Compile a config's training step for a TPU pod, without one, "
    "and say what each chip needs. Takes a minute or more.",
  )
  cli.add_config_arguments(parser)
  parser.add_argument(
    "--topology", required=True, help=f"kind and shape, such as {EXAMPLES}"
  )
  args, extra = parser.parse_known_args(argv)
  config = cli.parse_config(args.config, extra)
  jax.config.update("jax_platforms", "cpu")  # no chip is used
  print(f"compiling for {args.topology}, a minute or more...", flush=True)
  print(describe(config, plan(config, args.topology)))
  return 0
