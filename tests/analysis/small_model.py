# SPDX-License-Identifier: Apache-2.0
"""The folder of a small model's run and texts of two kinds."""

from moejax.config import Config
from tests.fresh_run import fresh_run

CODE = "def f(x):\n  return [y + 1 for y in x if y]\n\n"
PROSE = "The cat sat on the mat; later it saw two red hats, and slept. "
T, E, K = 32, 6, 2


def config_of(data=None, **model):
  model = {
    "vocab_size": 262, "d_model": 24, "num_layers": 3, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "d_mlp": 20, "dtype": "float32",
    "init_std": 0.3, "qk_norm": "none", "prefix": ("attention/mlp",),
    "pattern": ("moa/moe",),
    "moe": {"num_experts": E, "d_expert": 12, "router": f"top_k(k={K})"},
  } | model  # fmt: skip
  return Config.from_dict(
    {"model": model, "data": {"seq_len": T} | (data or {})}
  )


def make_run(folder, data=None, **model):
  """A run of untrained weights, at step 3; options of `data` and `model`."""
  folder.mkdir(parents=True, exist_ok=True)
  return fresh_run(folder, config_of(data, **model))


def make_texts(folder):
  """Sources by domain: one document a file, of lengths that leave padding."""
  domains = {}
  for name, text in (("code", CODE), ("prose", PROSE)):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(6):
      (folder / name / f"{i}.txt").write_text(text * (i + 1) + str(i))
    domains[name] = [str(folder / name)]
  return domains
