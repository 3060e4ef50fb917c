# SPDX-License-Identifier: Apache-2.0
"""Collectives beside other work: what compilers have to be asked for.

By its defaults libtpu 0.0.42 waits for every collective of a training step.
With these, weights are gathered and gradients added up within the kernels that
run meanwhile, and rows travel to their experts beside other work (seen in the
compiled programs; not yet measured on a chip).
"""

import re
import warnings

import jax

TPU_OPTIONS = dict.fromkeys(
  (
    "xla_enable_async_all_gather",
    "xla_enable_async_all_reduce",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call",
    "xla_tpu_enable_async_ragged_all_to_all",
    "xla_tpu_enable_latency_hiding_scheduler",
    "xla_tpu_overlap_compute_collective_tc",
  ),
  "true",
) | dict.fromkeys(
  # Else a projection whose weights are gathered becomes as many products as
  # there are devices, each of which adds to the whole result in HBM: OLMoE on
  # 32 chips of v5p is then bound by 40.9% of the peak instead of 59.8%.
  (
    "xla_tpu_enable_windowed_einsum_for_all_gather",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter",
  ),
  "false",
)


# The GPU compiler overlaps by itself, but not in every program (not in that of
# Hunyuan-Large with experts apart).
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}
_OPTIONS = {"tpu": TPU_OPTIONS, "gpu": GPU_OPTIONS}


_IN_KERNELS = "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call"


def options_of(platform: str, overlap: str) -> dict[str, str | bool]:
  """What a platform's compiler is asked; `overlap` as `config.parallel`'s."""
  if overlap == "none" or platform not in _OPTIONS:
    return {}
  asked = dict(_OPTIONS[platform])
  if overlap == "other":
    asked.pop(_IN_KERNELS, None)
  return asked


def compile_overlapped(
  lowered: jax.stages.Lowered, platform: str, overlap: str
) -> jax.stages.Compiled:
  """Compiles a program of many devices of a platform: cpu, gpu or tpu.

  An option that this compiler does not know is left out, with a warning.
  """
  options = options_of(platform, overlap)
  while True:
    try:
      return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
      unknown = re.search(r"No such compile option: '(\w+)'", str(e))
      if not unknown or unknown.group(1) not in options:
        raise
      del options[unknown.group(1)]
      warnings.warn(
        f"this compiler has no {unknown.group(1)}: collectives may be "
        "waited for",
        stacklevel=2,
      )
