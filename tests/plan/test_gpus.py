# SPDX-License-Identifier: Apache-2.0
"""Plans for GPUs, by their compiler; nodes and what cuDNN and cuBLAS cost."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from moejax.ops.grouped_matmul import gpu
from moejax.plan import topology
from moejax.plan.chips import GPUS
from moejax.plan.collectives import Fabric
from moejax.plan.network import Nodes
from moejax.plan.program import Program
from moejax.plan.roofline import Walk
from tests.plan.test_command import plan

CHIP = GPUS["NVIDIA H100 80GB HBM3"]
PAIR = Nodes(CHIP, (0, 0, 0, 0, 1, 1, 1, 1))
MESH = Fabric((("data", 8),), PAIR)


def test_rings_leave_a_node_by_all_cards_of_a_group():
  assert PAIR.gather_seconds(range(4), 1e9) == 1e9 / CHIP.link
  assert PAIR.gather_seconds(range(8), 1e9) == 1e9 / (4 * CHIP.nic)
  assert PAIR.gather_seconds([0, 4], 1e9) == 1e9 / CHIP.nic


def test_an_exchange_leaves_by_one_card():
  """Half of all bytes stay in a node of half the devices."""
  assert PAIR.exchange_seconds(range(8), 1e9) == 0.5e9 / CHIP.nic
  within = PAIR.exchange_seconds(range(4), 1e9)
  assert within == pytest.approx(0.75e9 / CHIP.link)


def walk(lines, rows=0):
  text = f"ENTRY %main (p: f32[]) -> f32[] {{\n{lines}}}\n"
  return Walk(Program.parse(text), MESH, rows)


def test_attention_of_cudnn():
  """Causal: half of 2 products, or of 5, over all pairs and heads."""
  scores = (
    '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": '
    '["2", "4", "256", "256"]}, "mask_type": "CAUSAL"'
  )
  lines = "  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)\n"
  for name in ("", "Backward"):
    lines += (
      f"  %a{name} = bf16[2,4,256,64]{{3,2,1,0}} custom-call(%q, %q, %q), "
      f'custom_call_target="__cudnn$fmhaScaleBiasSoftmax{name}", '
      f'backend_config={{"cudnn_fmha_backend_config": {{{scores}}}}}\n'
    )
  forward, backward = walk(lines).work
  assert forward.flops == 2 * 2 * 2 * 4 * 256 * 256 * 64 / 2
  assert backward.flops == 5 / 2 * forward.flops
  assert forward.bytes == 4 * 2 * 4 * 256 * 64 * 2


def test_a_product_of_cublas():
  (product,) = walk(
    "  %x = bf16[32,64]{1,0} parameter(0)\n"
    "  %y = bf16[64,16]{1,0} parameter(1)\n"
    "  %z = bf16[32,16]{1,0} custom-call(%x, %y), custom_call_target="
    '"__cublas$lt$matmul", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}\n'
  ).work
  assert product.flops == 2 * 32 * 64 * 16
  assert product.bytes == 2 * (32 * 64 + 64 * 16 + 32 * 16)


def test_a_kernel_that_nobody_knows_is_named():
  found = walk(
    "  %x = f32[4]{0} parameter(0)\n  %y = f32[4]{0} custom-call(%x), "
    'custom_call_target="__gpu$xla.gpu.triton"\n'
  )
  assert list(found.unknown) == ["a kernel that declares no cost, y"]


@pytest.fixture
def cuda():
  for module in ("jax_cuda13_plugin", "tokamax"):
    if not importlib.util.find_spec(module):
      pytest.skip("the [plan-gpu] extra is not installed")


@pytest.mark.filterwarnings("ignore:jax.experimental.pallas.dot")  # tokamax's
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a100", "h100", "h200", "b200"])
def test_grouped_products_do_no_more_than_they_need(cuda, kind):
  """Not the dense product over all experts that XLA makes of ragged_dot."""
  where = SingleDeviceSharding(topology.devices_of(f"{kind}:1x1")[0])
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=where
  )
  lhs, rhs, out = array(4096, 512), array(16, 512, 256), array(4096, 256)
  sizes = array(16, dtype=jnp.int32)
  cases = [
    (gpu.gmm, lhs, rhs, sizes),
    (gpu.gmm_transposed, out, rhs, sizes),
    (lambda *a: gpu.tgmm(*a, jnp.bfloat16), lhs, out, sizes),
  ]
  for function, *arrays in cases:
    compiled = jax.jit(function).lower(*arrays).compile()
    found = Walk(Program.parse(compiled.as_text()), MESH, 4096)
    assert not found.unknown
    flops = sum(w.flops for w in found.work)
    assert flops == 2 * 4096 * 512 * 256
    # The weights are transposed for d_lhs, and rows beyond the groups zeroed.
    moved = sum(w.bytes for w in found.work)
    least = sum(np.prod(a.shape) * 2 for a in (lhs, rhs, out))
    assert least <= moved < 4 * least


@pytest.mark.slow
def test_a_step_is_planned_for_cards_that_are_not_here(cuda):
  done = plan(
    "--topology=h100:2x8", "--config.parallel.expert=8",
    "--config.parallel.fsdp=2", "--config.model.num_layers=2",
    "--config.train.batch_size=32",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "16 x h100; mesh: fsdp 2, expert 8" in done.stdout
  assert "of 79.1 GiB: fits" in done.stdout
  assert "ragged-all-to-all" in done.stdout


@pytest.mark.slow
def test_a_card_that_is_too_small(cuda):
  done = plan(
    "--topology=h100:1x1", "--config.model.d_model=8192",
    "--config.model.num_layers=2", "--config.model.moe.d_expert=65536",
  )  # fmt: skip
  assert done.returncode == 2, done.stdout
  assert "a device of h100:1x1 has 79.1 GiB; split it further" in done.stderr


def test_no_compiler_for_gpus_here():
  if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    pytest.skip("it is here")
  done = plan("--topology=h100:2x8")
  assert done.returncode == 2
  assert "pip install -c constraints.txt -e '.[plan-gpu]'" in done.stderr
