# SPDX-License-Identifier: Apache-2.0
"""A plan in words and numbers."""

import math

from moejax.config import Config, ParallelConfig
from moejax.plan.compiled import Plan, rows_at_once
from moejax.progress import format_bytes

_RESERVED = 0.75  # of a GPU's memory, by JAX, unless it is told


def describe(config: Config, plan: Plan, price: float | None = None) -> str:
  """A plan as a table.

  Args:
    config: what was planned.
    plan: what came out.
    price: dollars an hour of a chip; None leaves the costs out.
  """
  rows = [
    *_size(config, plan),
    *_memory(config, plan),
    *_time(config, plan),
    *_network(plan),
    *(("uncertain", what) for what in plan.roofline.unknown),
    *_bill(config, plan, price),
    ("compiled in", f"{plan.compiled_in:.0f} s"),
  ]
  return "\n".join(f"{name:20} {text}".rstrip() for name, text in rows)


def summary(config: Config, plan: Plan) -> str:
  """A plan in a line of a table; `HEADER` names its columns."""
  seconds = plan.roofline.seconds
  needs = format_bytes(plan.memory.total)
  return (
    f"{mesh_name(config):34} {config.model.remat:10} "
    f"{needs:>11} {plan.mfu(plan.roofline.local):7.1%} "
    f"{plan.mfu(seconds):9.1%} {tokens_a_step(config) / seconds:14,.0f}"
  )


HEADER = (
  f"{'mesh':34} {'remat':10} {'a device':>11} {'MFU <':>7} "
  f"{'+ network':>9} {'tokens/s <':>14}"
)


def mesh_name(config: Config) -> str:
  """The axes that split anything."""
  sizes = {a: getattr(config.parallel, a) for a in ParallelConfig.AXES}
  return ", ".join(f"{a} {n}" for a, n in sizes.items() if n > 1) or "none"


def tokens_a_step(config: Config) -> int:
  return config.train.batch_size * config.data.seq_len


def _size(config: Config, plan: Plan):
  tokens, network = tokens_a_step(config), plan.network
  cores = f", {network.cores} devices each" if network.cores > 1 else ""
  yield (
    "chips",
    f"{network.num_chips} x {network.chip.name}{cores}; mesh: "
    f"{mesh_name(config)}",
  )
  yield "tokens a step", f"{tokens:,}, {tokens // plan.devices:,} a device"


def _memory(config: Config, plan: Plan):
  memory = plan.memory
  for name, size in (
    ("weights", memory.weights),
    ("optimizer, state", memory.optimizer),
    ("gradients", memory.gradients),
    ("kept for backward", memory.kept),
    ("temporary", memory.temporary),
  ):
    if size:  # without a loop over layers, the last are temporary
      yield name, format_bytes(size)
  yield "a device needs", format_bytes(memory.total) + _limit(plan)
  if config.parallel.expert > 1:
    yield "room for rows", _room(config)


def _limit(plan: Plan) -> str:
  """What there is; a step that needs more was refused."""
  chip = plan.network.chip
  if not chip.memory:
    return ""
  fits = f" of {format_bytes(chip.memory)}: fits"
  share = plan.memory.total / chip.memory
  if chip.nic and share > _RESERVED:
    share = min(math.ceil(share * 100) / 100 + 0.02, 0.99)
    fits += f", with XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f} or more"
  return fits


def _room(config: Config) -> str:
  """What unevenly loaded experts may do to a device."""
  parallel, sent = config.parallel, rows_at_once(config)
  here = config.model.moe.num_experts // parallel.expert
  k = config.model.moe.experts_per_token
  most = parallel.expert * sent // k * min(k, here)
  if config.parallel.receive_factor:
    room = min(int(parallel.receive_factor * sent), most)
    return (
      f"{room:,} a layer, {room / sent:.3g} times an even load; {most:,} could "
      "come: rows beyond are dropped and counted"
    )
  return f"{most:,} a layer, {most / sent:.3g} times an even load: all fit"


def _time(config: Config, plan: Plan):
  line = plan.roofline
  model = plan.flops / plan.devices
  yield (
    "FLOPs a device",
    f"{line.flops:.3g} a step, {line.flops / model:.2f} times the model's",
  )
  yield "HBM traffic", f"{line.bytes:.3g} bytes a step"
  yield (
    "instructions",
    f"{line.compute:.3g} s of those that arithmetic bounds, "
    f"{line.memory:.3g} s of those that memory bounds",
  )
  yield (
    "collectives",
    f"{line.waits:.3g} s waited for, {line.hidden:.3g} s beside other work",
  )
  tokens = tokens_a_step(config)
  yield (
    "a step, at least",
    f"{line.seconds:.3g} s: {tokens / line.seconds:,.0f} tokens/s, "
    f"MFU {plan.mfu(line.seconds):.1%}",
  )
  yield (
    "without the network",
    f"{line.local:.3g} s: {tokens / line.local:,.0f} tokens/s, "
    f"MFU {plan.mfu(line.local):.1%}",
  )


def _network(plan: Plan):
  large = [t for t in plan.roofline.traffic if t.bytes >= 1e6]
  small = [t for t in plan.roofline.traffic if t.bytes < 1e6]
  for t in large:
    yield (
      f"  over {', '.join(t.axes)}",
      f"{t.kind} {format_bytes(t.bytes)} in {t.runs} calls, "
      f"{t.seconds:.3g} s, of which {t.waits:.3g} s waited for",
    )
  if small:
    yield (
      "  others",
      f"{format_bytes(sum(t.bytes for t in small))} in "
      f"{sum(t.runs for t in small)} calls, "
      f"{sum(t.seconds for t in small):.3g} s, of which "
      f"{sum(t.waits for t in small):.3g} s waited for",
    )


def _bill(config: Config, plan: Plan, price: float | None):
  tokens = tokens_a_step(config)
  seconds = plan.roofline.seconds
  everything = config.train.num_steps * tokens
  yield (
    "the whole run",
    f"{everything:.3g} tokens, {config.train.num_steps * seconds / 86400:,.3g} "
    "days at least",
  )
  if price is not None:
    an_hour = price * plan.network.num_chips
    cost = an_hour * seconds / 3600 / tokens * 1e9
    yield (
      "price",
      f"${cost:,.2f} a billion tokens, ${cost * everything / 1e9:,.0f} the "
      f"run, at ${price:g} a chip and hour",
    )
