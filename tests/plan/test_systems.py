# SPDX-License-Identifier: Apache-2.0
"""The published systems on the pods that their configs name."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from moejax import cli
from moejax.memory import device_bytes
from moejax.plan import plan
from moejax.plan.compiled import compile_for, rows_at_once
from moejax.plan.kernels import cost
from moejax.plan.program import Program

ROOT = Path(__file__).parents[2]
SYSTEMS = ("olmoe_1b_7b", "jetmoe_8b", "dbrx_132b", "hunyuan_large")


@pytest.fixture(autouse=True)
def libtpu():
  pytest.importorskip("libtpu", reason="the [plan] extra is not installed")


def recommended(name):
  """The command of a config's docstring: its topology and its config."""
  path = ROOT / "configs" / f"{name}.py"
  command = re.search(
    r"moejax plan --config=\S+ --topology=(\S+)((?: \\\n +--\S+| --\S+)*)",
    path.read_text(),
  )
  assert command, f"{name} names no pod"
  options = re.findall(r"--config\.\S+", command.group(2))
  return command.group(1), cli.parse_config(str(path), options)


def shortened(config, repeats=3):
  """The same with fewer repeats of its layers."""
  model = config.model
  layers = model.num_layers - (model.num_repeats - repeats) * len(model.pattern)
  model = dataclasses.replace(model, num_layers=layers)
  return dataclasses.replace(config, model=model)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_steps_keep_what_makes_them_fit(name):
  topology, config = recommended(name)
  config = shortened(config)
  compiled, mesh, state = compile_for(config, topology)
  program = Program.parse(compiled.as_text())
  # Parameters are split over all devices of each copy that `data` asks for,
  # the optimizer's state over those too.
  whole = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  each = mesh.size / mesh.shape["data"]
  assert device_bytes(state.params) < 1.1 * whole(state.params) / each
  moments = state.opt_state
  assert device_bytes(moments) < 1.1 * whole(moments) / mesh.size
  # It is given away to the next state.
  given = compiled.memory_analysis().alias_size_in_bytes
  assert given > 0.99 * device_bytes(state)
  # One body for all layers: a kernel per product, not per layer and product.
  where = [
    (op, computation)
    for computation in program.computations.values()
    for op in computation.instructions.values()
  ]
  kernels = [op for op, _ in where if "tpu_custom_call" in op.attributes]
  assert 0 < len(kernels) < 40 * len(config.model.pattern)
  assert all(
    cost(op, c, rows_at_once(config)) for op, c in where if op in kernels
  )
  # Logits of a chunk of tokens at a time; the table itself may be larger.
  tokens = config.train.batch_size * config.data.seq_len // mesh.size
  vocab = config.model.vocab_size // config.parallel.tensor
  for op, _ in where:
    for shape in op.shapes:
      table = config.model.d_model in shape.dims
      if shape.dtype == "f32" and vocab in shape.dims and not table:
        assert shape.size < tokens // 2 * vocab, op.name


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5p:2x2x1", "v6e:2x2"])
def test_expert_products_are_not_dense(kind):
  """lax.ragged_dot is a product with all experts on all TPUs but v5p."""
  options = ["parallel.data=1", "parallel.fsdp=4", "train.batch_size=4"]
  options += ["parallel.overlap=other"]  # libtpu aborts on so few tokens
  config = cli.parse_config(
    str(ROOT / "configs/olmoe_1b_7b.py"),
    [f"--config.{x}" for x in (*options, "model.remat=dots")],
  )
  config = shortened(config, repeats=2)
  made = plan(config, kind)
  assert not made.roofline.unknown
  # 64 experts, 8 of them chosen: dense products would be 8 times as much.
  assert made.roofline.flops < 1.1 * made.flops / made.devices


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("experts", [8, 32])
def test_rows_travel_four_times(experts):
  """To the experts and back, forward and backward, k rows a token."""
  axes = ["parallel.data=1", "parallel.expert=8", "parallel.receive_factor=2.0"]
  axes += ["parallel.overlap=other"]
  config = cli.parse_config(
    str(ROOT / "configs/olmoe_1b_7b.py"),
    [
      f"--config.{x}"
      for x in (
        *axes, "train.batch_size=8", "model.remat=exchange",
        f"model.moe.num_experts={experts}",
      )
    ],
  )  # fmt: skip
  config = shortened(config, repeats=2)
  made = plan(config, "v5p:2x2x2")
  rows = [t for t in made.roofline.traffic if t.kind == "ragged-all-to-all"]
  assert {t.axes for t in rows} == {("expert",)}
  moe, layers = config.model.moe, config.model.num_layers
  tokens = config.train.batch_size * config.data.seq_len // 8
  least = 4 * layers * tokens * moe.experts_per_token * config.model.d_model * 2
  # A device keeps an eighth of the rows.
  assert sum(t.bytes for t in rows) < 1.1 * least * 7 / 8


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [16, 1])
def test_parts_of_rows_attend_by_the_kernel(kv_heads):
  """Two devices a row: half of the heads each, or half of the queries."""
  options = ["fsdp=2", "sequence=2", "overlap=other"]
  config = cli.parse_config(
    str(ROOT / "configs/olmoe_1b_7b.py"),
    [f"--config.parallel.{x}" for x in options]
    + ["--config.train.batch_size=4", "--config.model.remat=dots"]
    + [f"--config.model.num_kv_heads={kv_heads}"],
  )
  compiled, *_ = compile_for(shortened(config, repeats=2), "v5p:2x2x1")
  text = compiled.as_text()
  assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
