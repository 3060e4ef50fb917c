# SPDX-License-Identifier: Apache-2.0
"""Two processes write one checkpoint, agree on it, and stop together."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from moejax.checkpoint import CheckpointReader, state_digest
from moejax.errors import CheckpointError

WORKER = """
import os, pathlib, resource, signal, sys, time
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
import jax
jax.distributed.initialize(f"localhost:{port}", 2, index,
                           heartbeat_timeout_seconds=20)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moejax.checkpoint import Checkpointer, layout, state_digest
from moejax.errors import CheckpointError
from moejax.runlock import PreemptionGuard

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
shardings = {"params": {"w": NamedSharding(mesh, P("x"))},
             "opt_state": {"count": NamedSharding(mesh, P())}}

def make(step):
  return {"params": {"w": jnp.arange(4096.0).reshape(8, 512) + step},
          "opt_state": {"count": jnp.int32(step)}}

make = jax.jit(make, out_shardings=shardings)
abstract = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  jax.eval_shape(make, 0), shardings)
with Checkpointer(folder, keep_last=2) as ckpt:
  for step in (1, 2, 3):
    ckpt.save(step, make(step), {"digest": state_digest(make(step))})
  ckpt.wait()
  assert ckpt.steps() == [2, 3], ckpt.steps()

  # One file is damaged; whichever process it falls to, both pass it over.
  jax.experimental.multihost_utils.sync_global_devices("saved")
  if index == 0:
    big = max((folder / "3").rglob("*"), key=lambda p: p.stat().st_size
              if p.is_file() and p.name != "manifest.json" else 0)
    big.write_bytes(big.read_bytes()[:-1])
  jax.experimental.multihost_utils.sync_global_devices("damaged")
  restored = ckpt.restore(abstract)
  assert restored.step == 2
  assert state_digest(restored.state) == restored.meta["digest"]

  # Process 0 cannot make the folder: neither is left waiting.
  begin = layout.begin
  layout.begin = lambda folder: 1 / 0
  message = ""
  try:
    ckpt.save(3, make(3), {})
  except CheckpointError as e:
    message = str(e)
  layout.begin = begin
  expected = ["ZeroDivisionError", "process 0 could not begin it"][index]
  assert expected in message, message

  # A disk that is full for one process only: both learn of it, and go on.
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
  ckpt.save(3, make(3), {})
  start, message = time.monotonic(), ""
  try:
    ckpt.wait()
  except CheckpointError as e:
    message = str(e)
  resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert "saving step 3" in message, message
  who = "failed: " if index else "process 1 could not write its part: "
  assert f"{who}File too large" in message, message
  assert time.monotonic() - start < 60
  assert ckpt.latest() == 2
  ckpt.save(3, make(3), {"digest": state_digest(make(3))})

# Only one process gets the signal; both stop after the same step.
with PreemptionGuard() as guard:
  for step in range(10**8):
    if step == 5 and index == 1:
      os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    jax.block_until_ready(make(step))
    if guard.should_stop(step):
      break
print("stopped", step)
"""


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


@pytest.mark.parametrize(
  "stop_signal", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)]
)
def test_two_processes(tmp_path, stop_signal):
  port = free_port()
  logs = [tmp_path.parent / f"{tmp_path.name}.{i}.log" for i in range(2)]
  flags = "--xla_force_host_platform_device_count=2"
  workers = []
  try:
    for i, log in enumerate(logs):
      # Files, as a full pipe would stop a process that the other waits for.
      with log.open("w") as f:
        args = [str(i), str(port), str(tmp_path), stop_signal]
        workers.append(
          subprocess.Popen(
            [sys.executable, "-c", WORKER, *args], stdout=f, stderr=f,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
          )
        )  # fmt: skip
    codes = [worker.wait(timeout=300) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  texts = [log.read_text() for log in logs]
  both = "\n".join(text[-3000:] for text in texts)
  assert codes == [0, 0], both
  first, second = (text.rpartition("stopped ")[2].split()[0] for text in texts)
  assert first == second, "stopped at different steps"
  assert int(first) >= 5
  assert "passing over the damaged checkpoint of step 3" in texts[0]
  assert "passing over the damaged checkpoint of step 3" in texts[1]

  # One process reads what two have written.
  reader = CheckpointReader(tmp_path)
  assert reader.steps() == [2, 3]
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  restored = reader.restore(
    {
      "params": {
        "w": jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=device)
      },
      "opt_state": {
        "count": jax.ShapeDtypeStruct((), "int32", sharding=device)
      },
    }
  )
  assert state_digest(restored.state) == restored.meta["digest"]
  files = {p.name for p in (tmp_path / "3").iterdir()}
  assert files == {"arrays", "meta.json", "manifest.json"}
  # The digests cover both processes' files.
  (tmp_path / "3/arrays/params/ocdbt.process_1/manifest.ocdbt").unlink()
  with pytest.raises(CheckpointError, match="process_1"):
    reader.restore_params(
      {
        "params": {
          "w": jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=device)
        }
      },
      step=3,
    )
