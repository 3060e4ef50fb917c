# SPDX-License-Identifier: Apache-2.0
"""What the chips of a pod can do."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """Rates of one chip.

  Attributes:
    name: in topologies' names.
    peak: dense bf16 FLOP/s by the data sheet; what MFU refers to.
    flops, bandwidth: FLOP/s and bytes/s of its memory that XLA's own model of
      the chip reckons with; of the data sheet where XLA says nothing.
    memory: bytes that programs may use; 0 if unknown.
    link: bytes/s one way, of one link of a TPU, of all NVLinks of a GPU.
    wraps: of TPUs: a side of the torus of a multiple of this closes to a ring.
    nic: of GPUs: bytes/s one way between nodes, each GPU's share.
  """

  name: str
  peak: float
  flops: float
  bandwidth: float
  memory: int
  link: float
  wraps: int = 0
  nic: float = 0.0


_GIB = 2**30
# Peaks and memory rates: Google Cloud's pages of each version; `flops` and
# `bandwidth` of v5p and v6e: found from `optimal_seconds` of single products;
# links: "How to Scale Your Model" (jax-ml.github.io/scaling-book); v7x as v5p,
# both 1,200 GB/s a chip in all directions by Google Cloud's pages.
TPUS = {
  "TPU v4": Chip("v4", 275e12, 275e12, 1.23e12, 0, 45e9, 4),
  "TPU v5 lite": Chip(
    "v5e", 197e12, 197e12, 0.82e12, int(15.75 * _GIB), 45e9, 16
  ),
  "TPU v5": Chip(
    "v5p", 459e12, 394e12, 2.35e12, int(95.74 * _GIB), 90e9, 4
  ),
  "TPU v6 lite": Chip(
    "v6e", 918e12, 918e12, 1.64e12, int(31.25 * _GIB), 90e9, 16
  ),
  "TPU7x": Chip("tpu7x", 2307e12, 2307e12, 7.38e12, 0, 90e9, 4),
}  # fmt: skip
# NVIDIA's data sheets, SXM, dense; memory as XLA's specs of the cards have it
# (H200's: a little below the 143,771 MiB that nvidia-smi shows of one); `nic`:
# DGX systems, eight of 200 Gbit/s (A100) or of 400 Gbit/s.
GPUS = {
  "NVIDIA A100-SXM4-80GB": Chip(
    "a100", 312e12, 312e12, 2.039e12, 85_100_068_864, 300e9, nic=25e9
  ),
  "NVIDIA H100 80GB HBM3": Chip(
    "h100", 989e12, 989e12, 3.352e12, 84_942_979_072, 450e9, nic=50e9
  ),
  "NVIDIA H200": Chip(
    "h200", 989e12, 989e12, 4.8e12, 150_000_000_000, 450e9, nic=50e9
  ),
  "NVIDIA B200": Chip(
    "b200", 2250e12, 2250e12, 7.672e12, 191_514_411_008, 900e9, nic=50e9
  ),
}  # fmt: skip
CHIPS = TPUS | GPUS
TPU_KINDS = tuple(chip.name for chip in TPUS.values())
GPU_KINDS = tuple(chip.name for chip in GPUS.values())
