# SPDX-License-Identifier: Apache-2.0
"""The CPU back end in processes of its own: devices, threads, exit, cache.

Its handlers are Python functions on XLA's threads, so what is tried here is
what could deadlock: collectives between them, a busy interpreter, shutdown.
"""

import os
import subprocess
import sys
import textwrap

import pytest

SETUP = """
import threading
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from moejax.ops.grouped_matmul import grouped_matmul
"""


def run(code: str, devices: int = 1, timeout: int = 300, **env) -> str:
  env = {
    **os.environ,
    **env,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  done = subprocess.run(
    [sys.executable, "-c", SETUP + textwrap.dedent(code)],
    env=env,
    timeout=timeout,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.parametrize("busy", [False, True])
def test_shard_map_with_collectives_on_8_devices(busy):
  out = run(
    f"""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    draw = lambda *s: rng.standard_normal(s, dtype=np.float32) / 4
    sizes = np.stack([rng.multinomial(90, rng.dirichlet(np.ones(16)))
                      for _ in range(8)]).astype(np.int32)
    x, v, w = draw(8 * 96, 32), draw(16, 32, 24), draw(16, 24, 32)

    def loss(x, v, w, backend):
      def local(x, v, w, sizes):
        def layer(x, _):
          h = grouped_matmul(x, v, sizes[0], backend=backend)
          h = jnp.tanh(h + jax.lax.psum(h, "data") / 8)
          y = grouped_matmul(h, w, sizes[0], backend=backend)
          return x + jax.lax.all_gather(y, "data").mean(0), None
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, None, length=3)
        return jax.lax.psum((x ** 2).sum(), "data")
      return jax.shard_map(
          local, mesh=mesh, in_specs=(P("data"), P(), P(), P("data")),
          out_specs=P(), check_vma=False)(x, v, w, sizes)

    stop = threading.Event()
    def spin():
      while not stop.is_set():
        sum(range(1000))
    thread = threading.Thread(target=spin)
    if {busy}:
      thread.start()
    try:
      step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
      for _ in range(3):  # several in flight
        got = step(x, v, w, "cpu")
      got = jax.tree.map(np.asarray, jax.tree.leaves(got))
    finally:
      stop.set()
    for a, b in zip(got, jax.tree.leaves(step(x, v, w, "reference"))):
      error = np.linalg.norm(a - b) / np.linalg.norm(b)
      assert error < 1e-5, error
    print("same")
  """,
    devices=8,
  )
  assert out == "same\n"


PROGRAM = """
    x, w = jnp.ones((512, 256)), jnp.ones((8, 256, 256)) / 256
    sizes = jnp.full(8, 64)
    @jax.jit
    def f(x):
      step = lambda x, _: (grouped_matmul(x, w, sizes, backend="cpu"), None)
      return jax.lax.scan(step, x, None, length={length})[0].sum()
"""


def test_exit_with_programs_still_running():
  """Their handlers need the interpreter, which is about to shut down."""
  out = run(
    PROGRAM.format(length=300)
    + """
    f(x)
    y = f(x)
    print("started")
  """
  )
  assert out == "started\n"


def test_exit_after_an_exception():
  code = PROGRAM.format(length=300) + "    f(x)\n    raise SystemExit(0)\n"
  assert run(code) == ""


def test_compiled_program_from_the_cache(tmp_path):
  """Another process must find the handlers by name."""
  env = dict(
    JAX_COMPILATION_CACHE_DIR=str(tmp_path),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
  )
  code = PROGRAM.format(length=2) + "    print(float(f(x)))\n"
  first = run(code, **env)
  entries = set(tmp_path.glob("jit_f-*-cache"))
  assert len(entries) == 1
  assert first == run(code, **env) == f"{512 * 256:.1f}\n"
  assert set(tmp_path.glob("jit_f-*-cache")) == entries
