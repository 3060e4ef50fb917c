# SPDX-License-Identifier: Apache-2.0
"""A run of seconds, and the commands that make and use it."""

import os
import random
import subprocess
import sys
from pathlib import Path

CONFIG = """
from moejax.config import default_config

def get_config():
  c = default_config()
  m = c.model
  m.vocab_size, m.d_model, m.num_layers = 259, 32, 2
  m.num_heads = m.num_kv_heads = 2
  m.head_dim, m.dtype = 16, "float32"
  m.moe.num_experts, m.moe.d_expert = 4, 16
  m.moe.router = "top_k(k=2, jitter=0.1)"
  c.data.sources = ("text",)
  c.data.seq_len = 32
  c.data.validation_fraction = 0.1
  c.train.num_steps, c.train.batch_size = 40, 4
  c.optimizer.schedule.warmup, c.optimizer.schedule.decay = 5.0, 10.0
  c.optimizer.learning_rate = 1e-2
  c.checkpoint.every = 5
  c.eval.every, c.eval.num_batches = 15, 2
  c.eval.sample_tokens = 5
  return c
"""


def make_place(place: Path) -> Path:
  """A folder with a config, a corpus and its token store."""
  (place / "config.py").write_text(CONFIG)
  (place / "text").mkdir()
  words = "the cat sat on a mat and saw two red hats".split()
  rng = random.Random(0)
  for i in range(60):
    text = " ".join(rng.choice(words) for _ in range(rng.randrange(5, 60)))
    (place / "text" / f"{i}.txt").write_text(text)
  assert moejax(place, "data", "prepare", "--config=config.py").returncode == 0
  return place


def command(*args, page=False):
  """Of a process; training draws no page, which takes longer than these runs.

  Args:
    *args: the command's words.
    page: draw it all the same.
  """
  quiet = ["--no-report"] if args[0] == "train" and not page else []
  return [sys.executable, "-m", "moejax", *args, *quiet]


def environment():
  root = str(Path(__file__).parent.parent)
  return {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def moejax(place, *args):
  return subprocess.run(
    command(*args), cwd=place, env=environment(), capture_output=True,
    text=True, timeout=900,
  )  # fmt: skip
