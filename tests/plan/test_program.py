# SPDX-License-Identifier: Apache-2.0
"""Walking compiled programs, against arithmetic and XLA's own counts."""

import jax
import jax.numpy as jnp
import pytest

from moejax.plan import costs
from moejax.plan.chips import CHIPS
from moejax.plan.collectives import Fabric
from moejax.plan.network import Torus
from moejax.plan.program import Program, shapes
from moejax.plan.roofline import Walk, measure

ONE = Torus(CHIPS["TPU v5"], ((0, 0, 0),), (1, 1, 1), 1)


def compiled(function, *sizes):
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]
  return jax.jit(function).lower(*arrays).compile()


def walk(program_text):
  return Walk(Program.parse(program_text), Fabric((("data", 1),), ONE), 0)


def total_flops(text):
  return sum(w.flops for w in walk(text).work)


@pytest.mark.parametrize("layers", [1, 3, 17])
def test_loops_count_as_often_as_they_run(layers):
  def stack(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  text = compiled(stack, (8, 32), (layers, 32, 32)).as_text()
  assert total_flops(text) == layers * 2 * 8 * 32 * 32


def test_loops_in_loops():
  def inner(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ w), x)

  def outer(x, w):
    return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

  text = compiled(outer, (8, 32), (4, 32, 32)).as_text()
  assert total_flops(text) == 4 * 5 * 2 * 8 * 32 * 32


def test_a_branch_is_its_longest_side():
  def some(x, w, chosen):
    sides = [lambda x, w: x, lambda x, w: x @ w, lambda x, w: x @ w @ w]
    return jax.lax.switch(chosen.sum().astype(int), sides, x, w)

  text = compiled(some, (8, 32), (32, 32), (3,)).as_text()
  assert total_flops(text) == 2 * 2 * 8 * 32 * 32
  (what,) = walk(text).unknown
  assert what.startswith("a branch, counted as its longest side")


def test_a_loop_of_unknown_length_is_named():
  def grow(x):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x + 1, x)

  found = measure(
    Program.parse(compiled(grow, (8, 8)).as_text()),
    Fabric((("data", 1),), ONE), 0,
  )  # fmt: skip
  assert any("a loop of unknown length" in what for what in found.unknown)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"padding": "VALID"},
    {"window_strides": (2, 2)},
    {"lhs_dilation": (2, 1), "padding": ((1, 2), (0, 1))},
    {"rhs_dilation": (1, 2)},
    {"feature_group_count": 4},
    {"batch_group_count": 2},
  ],
  ids=str,
)
def test_convolutions_count_as_xla_counts_them(options):
  """The TPU compiler writes matrix products as convolutions."""
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  groups = 4 if "feature_group_count" in options else 1
  program = compiled(
    lambda x, k: jax.lax.conv_general_dilated(x, k, **options),
    (2, 8, 9, 11), (12, 8 // groups, 3, 3),
  )  # fmt: skip
  module = Program.parse(program.as_text())
  found = sum(
    costs.flops(op, where, module)
    for where in module.computations.values()
    for op in where.instructions.values()
    if op.opcode == "convolution"
  )
  if not found:
    pytest.skip("this compiler made something else of it")
  assert found == pytest.approx(program.cost_analysis()["flops"], rel=1e-6)


def test_traffic_of_an_elementwise_operation_is_its_arrays():
  text = compiled(lambda x, y: jnp.tanh(x) * y, (64, 64), (64, 64)).as_text()
  assert sum(w.bytes for w in walk(text).work) == 3 * 4 * 64 * 64


def test_a_slice_of_a_stack_is_not_the_stack():
  def last(x, stack):
    def body(x, i):
      part = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
      return x + jnp.tanh(part), None

    return jax.lax.scan(body, x, jnp.arange(50))[0]

  text = compiled(last, (64, 64), (50, 64, 64)).as_text()
  layer = 4 * 64 * 64
  assert sum(w.bytes for w in walk(text).work) < 50 * 6 * layer


@pytest.mark.parametrize("kind, products", [("fwd", 2), ("dkv", 5)])
def test_splash_attention_of_a_part_of_the_queries(kind, products):
  """The last 128 of 512: each sees what is before it, 384 keys and more."""
  text = (
    "ENTRY %main (q: f32[]) -> f32[] {\n"
    "  %m = s8[1,1,4]{2,1,0} parameter(0)\n"
    "  %q = bf16[2,4,128,64]{3,2,1,0} parameter(1)\n"
    "  %k = bf16[2,1,512,64]{3,2,1,0} parameter(2)\n"
    f"  %splash_mha_{kind}.1 = bf16[2,4,128,64]{{3,2,1,0}} "
    'custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"\n}\n'
  )
  pairs = 2 * 4 * 128 * (384 + 128 / 2)
  assert total_flops(text) == products * 2 * pairs * 64


def test_shapes():
  found = shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[])")
  assert [s.dims for s in found] == [(2, 3), ()]
  assert [s.on_chip for s in found] == [True, False]
  assert [s.bytes for s in found] == [12, 4]
