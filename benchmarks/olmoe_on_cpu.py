# SPDX-License-Identifier: Apache-2.0
"""OLMoE-shaped model on a CPU: moejax beside Hugging Face transformers.

  python benchmarks/olmoe_on_cpu.py            (needs the [hf] extra)

109 M parameters: D 512, 4 layers, 8 heads, 64 experts top-8 of width 256,
vocabulary 4096, batch 4 x 512, float32, AdamW. Each side lives in a process of
its own and idles while the other works; they take turns, so both see the same
machine. Prints tokens/s as medians over the turns, the ratio, and the floor.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

V, D, L, N, H, E, X, F = 4096, 512, 4, 8, 64, 64, 8, 256
B, T = 4, 512
PROMPT, NEW = 16, 48
SETTLE = 0.5  # seconds: the other side's OpenMP threads spin on for a while
TASKS = ("train", "forward", "decode 1", "decode 8")
SIDES = ("moejax", "transformers")


def tokens(batch, length):
  rng = np.random.default_rng(0)
  return rng.integers(3, V, (batch, length)).astype(np.int32)


def moejax_tasks():
  """Callables by task; each does one unit of work and waits for it."""
  import jax
  import jax.numpy as jnp

  from moejax.config import Config
  from moejax.generate import for_generation, generate_tokens
  from moejax.hardware import keep_freed_memory
  from moejax.models import Rows, build
  from moejax.sampling import Sampling
  from moejax.step import init_state, make_train_step

  config = Config.from_dict({
    "model": {
      "vocab_size": V, "d_model": D, "num_layers": L, "num_heads": N,
      "num_kv_heads": N, "head_dim": H, "dtype": "float32",
      "scan_layers": False,
      "moe": {"num_experts": E, "d_expert": F, "router": f"top_k(k={X})"},
    },
  })  # fmt: skip
  keep_freed_memory()
  model = build(config.model)
  state = jax.jit(lambda: init_state(config, model))()
  step = jax.jit(make_train_step(config, model), donate_argnums=0)
  row = jnp.asarray(tokens(B, T + 1))
  ones = jnp.ones((B, T), jnp.int32)
  positions = jnp.tile(jnp.arange(T), (B, 1))
  batch = {
    "tokens": row[:, :-1], "targets": row[:, 1:], "segment_ids": ones,
    "positions": positions, "loss_mask": ones > 0,
  }  # fmt: skip

  @jax.jit
  def logits(variables):
    rows = Rows(ones, positions)
    hidden = model.apply(variables, row[:, :-1], rows).hidden_BTD
    return model.apply(variables, hidden, method="logits")

  def train():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  def decode(batch_size):
    prompts = tokens(batch_size, PROMPT).tolist()
    out = generate_tokens(
      *for_generation(model, state.variables),
      prompts,
      NEW,
      Sampling(),
      jax.random.key(0),
    )
    assert all(len(row) == NEW for row in out)

  return {
    "train": train,
    "forward": lambda: logits(state.variables).block_until_ready(),
    "decode 1": lambda: decode(1),
    "decode 8": lambda: decode(8),
  }


def transformers_tasks(experts):
  """The same work in torch, with its experts implementation `experts`."""
  import torch
  from transformers import OlmoeConfig, OlmoeForCausalLM

  torch.set_num_threads(os.cpu_count())
  config = OlmoeConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
    num_attention_heads=N, num_key_value_heads=N, num_experts=E,
    num_experts_per_tok=X, max_position_embeddings=T, pad_token_id=0,
    eos_token_id=None, bos_token_id=None, attn_implementation="sdpa",
    experts_implementation=experts,
  )  # fmt: skip
  model = OlmoeForCausalLM(config).float()
  optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
  row = torch.tensor(tokens(B, T), dtype=torch.long)

  def train():
    model.train()
    loss = model(input_ids=row, labels=row, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  @torch.no_grad()
  def forward():
    model.eval()
    model(input_ids=row, use_cache=False)

  @torch.no_grad()
  def decode(batch_size):
    model.eval()
    prompt = torch.tensor(tokens(batch_size, PROMPT), dtype=torch.long)
    out = model.generate(
      prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
      min_new_tokens=NEW, max_new_tokens=NEW, use_cache=True,
    )  # fmt: skip
    assert out.shape[1] == PROMPT + NEW

  return {
    "train": train, "forward": forward,
    "decode 1": lambda: decode(1), "decode 8": lambda: decode(8),
  }  # fmt: skip


UNITS = {
  "train": B * T, "forward": B * T, "decode 1": NEW, "decode 8": 8 * NEW
}  # fmt: skip


def worker(side, experts):
  """Runs the task named on each line of stdin; answers with its seconds."""
  tasks = moejax_tasks() if side == "moejax" else transformers_tasks(experts)
  print("ready", flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    tasks[line.strip()]()
    print(time.perf_counter() - start, flush=True)


class Side:
  """A worker process, spoken to in lines."""

  def __init__(self, name, experts):
    self.process = subprocess.Popen(
      [sys.executable, __file__, f"--worker={name}", f"--experts={experts}"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if self.process.stdout.readline().strip() != "ready":
      raise SystemExit(f"{name} did not start; run it with --worker={name}")

  def run(self, task):
    time.sleep(SETTLE)
    self.process.stdin.write(task + "\n")
    self.process.stdin.flush()
    return float(self.process.stdout.readline())

  def close(self):
    self.process.stdin.close()
    self.process.wait()


def floors():
  """Best tokens/s that the machine allows, from two measured rates."""
  import jax
  import jax.numpy as jnp

  from moejax.hardware import keep_freed_memory

  keep_freed_memory()
  x, w = jnp.ones((4096, 512)), jnp.ones((512, 2048))
  dot = jax.jit(lambda a, b: a @ b)
  big = jnp.ones(64 << 20, jnp.float32)
  read = jax.jit(jnp.sum)

  def fastest(f, *args):
    best = 1e9
    for _ in range(8):
      start = time.perf_counter()
      f(*args).block_until_ready()
      best = min(best, time.perf_counter() - start)
    return best

  flops = 2 * 4096 * 512 * 2048 / fastest(dot, x, w)
  bandwidth = big.nbytes / fastest(read, big)
  active = L * (4 * D * D + D * E + X * 3 * D * F) + V * D
  attention = L * 2 * 2 * T * D / 2
  forward = B * T * (2 * active + attention) / flops
  params = 2 * V * D + L * (4 * D * D + D * E + E * 3 * D * F)
  train = 3 * forward + 7 * 4 * params / bandwidth
  print(
    f"floor from {flops / 1e9:.0f} GFLOP/s (dense product) and "
    f"{bandwidth / 1e9:.1f} GB/s (sum of 256 MB), measured before the turns"
  )
  # Experts of 8 rows overlap: expected number of distinct ones touched.
  touched = E * (1 - (1 - X / E) ** 8)
  eight = 4 * (L * (4 * D * D + D * E + touched * 3 * D * F) + V * D)
  return {
    "train": B * T / train, "forward": B * T / forward,
    "decode 1": bandwidth / (4 * active), "decode 8": 8 * bandwidth / eight,
  }  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--worker", choices=SIDES)
  parser.add_argument("--experts", default="grouped_mm")
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--json", help="also write the figures here")
  args = parser.parse_args()
  if args.worker:
    return worker(args.worker, args.experts)
  print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
  floor = floors()
  sides = {name: Side(name, args.experts) for name in SIDES}
  rows = []
  for task in TASKS:
    times = {name: [] for name in SIDES}
    for turn in range(args.turns + 1):
      for name, side in sides.items():
        seconds = side.run(task)
        if turn:  # the first turn compiles
          times[name].append(seconds)
    rate = {n: UNITS[task] / statistics.median(t) for n, t in times.items()}
    rows.append({"task": task, "floor": floor[task], **rate})
    row = rows[-1]
    print(
      f"{task:<9} moejax {row['moejax']:8.1f}  transformers "
      f"{row['transformers']:8.1f} tokens/s  ratio "
      f"{row['moejax'] / row['transformers']:.2f}  floor {row['floor']:8.1f} "
      f"(moejax at {row['moejax'] / row['floor']:.0%})",
      flush=True,
    )
  for side in sides.values():
    side.close()
  print(f"load average {os.getloadavg()[0]:.2f}")
  if args.json:
    with open(args.json, "w") as file:
      json.dump(rows, file, indent=2)


if __name__ == "__main__":
  main()
