# SPDX-License-Identifier: Apache-2.0
"""Peak memory and speed of `moejax convert`, beside a plain copy of the files.

  python benchmarks/conversion.py --layers 2

Writes an OLMoE-shaped hub folder (bfloat16, 1.3 GB for two layers), then runs
from-hf and to-hf as processes of their own. Memory is the highest anonymous
memory seen every 2 ms (pages of files can be taken away), less what importing
the command takes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.config import ModelConfig, MoEConfig
from moejax.convert import llama
from moejax.convert.hub_export import olmoe
from moejax.convert.hub_files import Entry, write_safetensors

# Runs a command of moejax and tells the peak of its anonymous memory.
PROBE = """
import sys, threading, time
def anonymous():
  for line in open('/proc/self/status'):
    if line.startswith('RssAnon'):
      return int(line.split()[1]) * 1024
peak = 0
def watch():
  global peak
  while True:
    peak = max(peak, anonymous())
    time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from moejax.convert.command import main
import moejax.checkpoint.arrays as arrays
arrays.load_orbax()
base = anonymous()
start = time.perf_counter()
main(sys.argv[1:])
print('RESULT', time.perf_counter() - start, peak - base)
"""


def model(layers: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=50304, num_layers=layers, scan_layers=False,
    moe=MoEConfig(num_experts=32, d_expert=1024, router="top_k(k=8)"),
  )  # fmt: skip


def write_hub(folder: Path, config: ModelConfig) -> None:
  rng = np.random.default_rng(0)
  entries = [
    Entry(name, shape, "bfloat16")
    for rule in llama.olmoe(config)
    for name, shape in zip(rule.names, rule.shapes)
  ]

  def draw(shape):
    bits = rng.integers(0, 2**15, shape, np.uint16)
    return bits.view(ml_dtypes.bfloat16)

  arrays = (draw(entry.shape) for entry in entries)
  write_safetensors(folder / "model.safetensors", entries, arrays)
  values = {"model_type": "olmoe", "torch_dtype": "bfloat16"} | olmoe(config)
  (folder / "config.json").write_text(json.dumps(values))


def probe(*args: str) -> tuple[float, float]:
  """(seconds, bytes) of one command."""
  done = subprocess.run(
    [sys.executable, "-c", PROBE, *args], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  seconds, peak = done.stdout.split("RESULT")[1].split()
  return float(seconds), float(peak)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--layers", type=int, default=2)
  args = parser.parse_args()
  config = model(args.layers)
  moe = config.moe
  widest = max(config.vocab_size, moe.num_experts * moe.d_expert)
  largest = 2 * config.d_model * widest
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "hub").mkdir()
    write_hub(folder / "hub", config)
    size = (folder / "hub/model.safetensors").stat().st_size
    print(
      f"checkpoint {size / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f}"
    )
    start = time.perf_counter()
    shutil.copyfile(folder / "hub/model.safetensors", folder / "copy")
    copying = time.perf_counter() - start
    print(f"{'copy':8} {copying:6.1f} s {size / copying / 1e6:6.0f} MB/s")
    hub, run, back = (str(folder / x) for x in ("hub", "run", "back"))
    for what in (
      ("from-hf", hub, run, "--tokenizer=byte"),
      ("to-hf", run, back, "--shard-size=0.5"),
    ):
      seconds, peak = probe(*what)
      print(
        f"{what[0]:8} {seconds:6.1f} s {size / seconds / 1e6:6.0f} MB/s, peak "
        f"{peak / 1e6:5.0f} MB = {peak / largest:.2f} of the largest tensor"
      )


if __name__ == "__main__":
  main()
