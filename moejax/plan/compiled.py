# SPDX-License-Identifier: Apache-2.0
"""What the compiler says of a config's training step on a pod."""

import dataclasses
import time

import jax

from moejax.config import Config
from moejax.errors import UserError
from moejax.memory import compile_for_platform, device_bytes, peak_bytes
from moejax.models import build, train_flops_per_token
from moejax.parallel import build_on_mesh, make_mesh
from moejax.plan import roofline
from moejax.plan.collectives import Fabric
from moejax.plan.network import Network, network_of
from moejax.plan.program import Instruction, Program
from moejax.plan.roofline import Roofline
from moejax.plan.topology import devices_of, platform_of
from moejax.progress import format_bytes
from moejax.step import abstract_state, state_shardings

_FIX = (
  "split it further by config.parallel, raise train.accumulation_steps, or set "
  "model.remat=full"
)


class DoesNotFit(UserError):
  """The compiler refuses a step; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of HBM on one device.

  Attributes:
    weights: parameters.
    optimizer: all other state.
    gradients: of the layers, stacked by the backward loop.
    kept: what the forward loop keeps of each layer for the backward loop.
    total: at the peak; all else is temporary.
  """

  weights: int
  optimizer: int
  gradients: int
  kept: int
  total: int

  @property
  def temporary(self) -> int:
    named = self.weights + self.optimizer + self.gradients + self.kept
    return self.total - named


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training step on a pod.

  Attributes:
    topology: its name.
    devices: how many.
    memory, roofline: of one of them.
    flops: of the model in a step, all devices; no recomputation.
    compiled_in: seconds.
  """

  topology: str
  devices: int
  memory: Memory
  roofline: Roofline
  flops: float
  compiled_in: float

  @property
  def network(self) -> Network:
    return network_of(devices_of(self.topology))

  def mfu(self, seconds: float) -> float:
    """Model FLOPs over what the chips could at their data sheet's rate."""
    network = self.network
    peak = network.chip.peak / network.cores
    return self.flops / self.devices / peak / seconds


def plan(config: Config, topology: str) -> Plan:
  """Compiles the training step of a config for a topology.

  Args:
    config: `parallel` must fit the topology's devices.
    topology: such as `v5p:4x4x4`.

  Raises:
    ConfigError: no such topology, or a mesh that does not fit it.
    DoesNotFit: more memory than a device has.
    UserError: there is no compiler here.
  """
  begun = time.perf_counter()
  compiled, mesh, state = compile_for(config, topology)
  compiled_in = time.perf_counter() - begun
  needed = peak_bytes(compiled, platform_of(topology))
  _check_card(needed, topology)
  program = Program.parse(compiled.as_text())
  fabric = Fabric(
    tuple(mesh.shape.items()), network_of(list(mesh.devices.flat))
  )
  tokens = config.train.batch_size * config.data.seq_len
  return Plan(
    topology=topology,
    devices=mesh.size,
    memory=_memory(needed, state, program),
    roofline=roofline.measure(program, fabric, rows_at_once(config)),
    flops=tokens * train_flops_per_token(config.model, config.data.seq_len),
    compiled_in=compiled_in,
  )


def compile_for(config: Config, topology: str):
  """The compiled step, its mesh, and the state with its shardings.

  Raises:
    As `plan`.
  """
  mesh = make_mesh(config.parallel, devices_of(topology))
  platform = platform_of(topology)
  model = build_on_mesh(config, mesh, platform)
  plain = build(config.model, platform)
  state = abstract_state(config, plain, state_shardings(config, plain, mesh))
  try:
    compiled = compile_for_platform(config, model, state, platform)
  except jax.errors.JaxRuntimeError as e:
    lines = [line for line in str(e).splitlines() if line.strip()]
    raise DoesNotFit(
      f"the compiler refuses this step on {topology}: {' '.join(lines[:2])}; "
      + _FIX
    ) from e
  return compiled, mesh, state


def _check_card(needed: int, topology: str) -> None:
  """The GPU compiler itself refuses nothing."""
  has = network_of(devices_of(topology)).chip.memory
  if platform_of(topology) == "gpu" and needed > has:
    raise DoesNotFit(
      f"this step needs {format_bytes(needed)}, a device of {topology} has "
      f"{format_bytes(has)}; {_FIX}"
    )


def rows_at_once(config: Config) -> int:
  """Rows that reach the experts of a device, if all experts get as many."""
  parallel, train = config.parallel, config.train
  tokens = train.batch_size * config.data.seq_len // train.accumulation_steps
  ways = parallel.data * parallel.fsdp * parallel.expert * parallel.sequence
  return tokens // ways * config.model.moe.experts_per_token


def _memory(total: int, state, program: Program) -> Memory:
  weights = device_bytes(state.params)
  kept, gradients = 0, 0
  main = program.computations[program.entry]
  for op in main.instructions.values():
    if op.opcode != "while":
      continue
    scope = _scope_of_loop(op, program)
    if "_scan/while" in scope:
      if "transpose(" in scope:
        gradients += program.stacked_bytes(op)
      else:
        kept += program.stacked_bytes(op)
  return Memory(
    weights, device_bytes(state) - weights, int(gradients), int(kept), total
  )


def _scope_of_loop(loop: Instruction, program: Program) -> str:
  """Its own, or one of its body's: a compiler that pipelines loops drops it."""
  body = program.computations[loop.called("body")]
  scopes = [loop.scope, *(x.scope for x in body.instructions.values())]
  return next((s for s in scopes if "_scan/while" in s), "")
