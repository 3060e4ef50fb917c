# SPDX-License-Identifier: Apache-2.0
"""Peak rates of accelerators, for model FLOPs utilisation."""

import jax

# Dense bf16 FLOP/s of one device, from the vendors' data sheets.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Peak bf16 FLOP/s of a device; None where it is not known (CPUs)."""
  matches = [k for k in PEAK_FLOPS if device.device_kind.startswith(k)]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None
