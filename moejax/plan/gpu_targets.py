# SPDX-License-Identifier: Apache-2.0
"""GPUs as their compiler wants them described, one by one."""

from moejax.plan.chips import GPUS

# Compute capability, cores, FP32 units and shared memory of a core, of a block
# that asks for it; L2 cache; GHz: XLA's own specs of the cards.
_CARDS = {
  "a100": (8, 108, 64, 167_936, 166_912, 41_943_040, 1.41),
  "h100": (9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
  "h200": (9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
  "b200": (10, 148, 128, 233_472, 232_448, 132_644_864, 1.965),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def target_config(kind: str) -> str:
  """XLA's `GpuTargetConfigProto` of a card, such as h100, as text."""
  name, chip = next((n, c) for n, c in GPUS.items() if c.name == kind)
  major, cores, units, shared, optin, l2, clock = _CARDS[kind]
  return _TARGET.format(
    name=name, memory=chip.memory, bandwidth=int(chip.bandwidth), major=major,
    cores=cores, units=units, shared=shared, optin=optin, l2=l2, clock=clock,
  )  # fmt: skip
