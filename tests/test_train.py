# SPDX-License-Identifier: Apache-2.0
"""The main job end to end, as a user runs it: in processes that get killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import runs
from moejax.checkpoint import CheckpointReader, state_digest
from moejax.cli import parse_config
from moejax.models import build
from moejax.step import init_state

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
  c.eval.every, c.eval.num_batches = 20, 2
  c.eval.sample_tokens = 5
  return c
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a config, a corpus and its token store."""
  place = tmp_path_factory.mktemp("train")
  (place / "config.py").write_text(CONFIG)
  (place / "text").mkdir()
  words = "the cat sat on a mat and saw two red hats".split()
  rng = random.Random(0)
  for i in range(60):
    text = " ".join(rng.choice(words) for _ in range(rng.randrange(5, 60)))
    (place / "text" / f"{i}.txt").write_text(text)
  assert moejax(place, "data", "prepare", "--config=config.py").returncode == 0
  return place


@pytest.fixture(scope="module")
def unbroken(place):
  """A run that nothing happened to."""
  done = train(place, "unbroken")
  assert done.returncode == 0, done.stderr
  return place / "unbroken"


def command(*args):
  return [sys.executable, "-m", "moejax", *args]


def environment():
  root = str(Path(__file__).parent.parent)
  return {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def moejax(place, *args):
  return subprocess.run(
    command(*args), cwd=place, env=environment(), capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip


def train(place, workdir, *overrides):
  return moejax(
    place, "train", "--config=config.py", f"--workdir={workdir}", *overrides
  )


def digest(run):
  config = runs.read_config(run)
  abstract = runs.on_device(
    jax.eval_shape(lambda: init_state(config, build(config.model)))
  )
  restored = CheckpointReader(run / "checkpoints").restore(abstract)
  return restored.step, state_digest(restored.state)


def lines(run, name="metrics.jsonl"):
  return (run / name).read_text().splitlines()


def assert_same_run(run, unbroken):
  assert digest(run) == digest(unbroken)
  for name in ("metrics.jsonl", "eval.jsonl", "router_load.jsonl"):
    assert lines(run, name) == lines(unbroken, name), name
  assert lines(run, "samples.jsonl") == lines(unbroken, "samples.jsonl")


def test_a_run_leaves_what_it_should(unbroken):
  metrics = [json.loads(line) for line in lines(unbroken)]
  assert [m["step"] for m in metrics] == list(range(1, 41))
  assert metrics[-1]["loss/xent"] < metrics[0]["loss/xent"] - 1
  assert metrics[-1]["router/dropped"] == 0
  assert len(lines(unbroken, "eval.jsonl")) == 2
  assert len(lines(unbroken, "samples.jsonl")) == 2
  record = json.loads((unbroken / "config.json").read_text())
  assert record["config"]["train"]["num_steps"] == 40
  assert record["versions"]["jax"] == jax.__version__
  assert (unbroken / "report" / "index.html").stat().st_size > 10_000
  assert list((unbroken / "events").iterdir())


def test_a_killed_run_ends_with_the_same_bytes(place, unbroken):
  """SIGKILL at three random moments, then left to finish."""
  rng = random.Random(os.environ.get("MOEJAX_KILL_SEED", "0"))
  run = place / "killed"
  for _ in range(3):
    process = subprocess.Popen(
      command("train", "--config=config.py", "--workdir=killed"),
      cwd=place, env=environment(), stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(run, rng.randrange(2, 36), process)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.wait()
  done = train(place, "killed")
  assert done.returncode == 0, done.stderr
  assert_same_run(run, unbroken)


def test_sigterm_saves_and_the_run_goes_on(place, unbroken):
  run = place / "stopped"
  process = subprocess.Popen(
    command("train", "--config=config.py", "--workdir=stopped"),
    cwd=place, env=environment(), stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  wait_for_step(run, 7, process)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  if process.returncode != 0:  # it may just have finished
    assert process.returncode == 75
    assert "saved; run the same command to go on" in out
    saved = CheckpointReader(run / "checkpoints").latest()
    assert len(lines(run)) == saved
  assert train(place, "stopped").returncode == 0
  assert_same_run(run, unbroken)


def wait_for_step(run, step, process):
  """Returns once the run has logged `step`, or is over."""
  path = run / "metrics.jsonl"
  limit = time.monotonic() + 120
  while time.monotonic() < limit and process.poll() is None:
    if path.exists() and len(path.read_bytes().splitlines()) >= step:
      return
    time.sleep(0.02)


def test_a_finished_run_says_so_and_can_be_extended(place, unbroken):
  again = train(place, "unbroken")
  assert again.returncode == 0
  assert "already trained to step 40" in again.stdout
  short = train(
    place, "extended", "--config.train.num_steps=25",
    "--config.optimizer.schedule.decay=0",
  )  # fmt: skip
  assert short.returncode == 0
  longer = train(place, "extended")
  assert longer.returncode == 0, longer.stderr
  assert "goes on at step 25" in longer.stdout
  assert digest(place / "extended") == digest(unbroken)


def test_an_extension_that_would_rewrite_history_is_refused(place, unbroken):
  done = train(place, "unbroken", "--config.train.num_steps=60")
  assert done.returncode == 2
  assert "train.num_steps: 40 -> 60" in done.stderr
  assert "before the decay begins" in done.stderr
  assert done.stderr.count("\n") == 1


def test_another_config_is_refused_by_name(place, unbroken):
  before = (unbroken / "config.json").read_bytes()
  done = train(
    place, "unbroken", "--config.model.moe.num_experts=8", "--config.seed=1"
  )
  assert done.returncode == 2
  assert "model.moe.num_experts: 4 -> 8; seed: 0 -> 1" in done.stderr
  assert done.stderr.count("\n") == 1
  assert (unbroken / "config.json").read_bytes() == before


def test_how_it_computes_may_change_on_resume(place, unbroken):
  done = train(
    place, "unbroken", "--config.train.accumulation_steps=2",
    "--config.model.remat=full", "--config.checkpoint.every=7",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


def test_another_corpus_is_refused(place, unbroken, tmp_path):
  os.symlink(place / "config.py", tmp_path / "config.py")
  (tmp_path / "text").mkdir()
  for i in range(30):
    (tmp_path / "text" / f"{i}.txt").write_text(f"other {i} text " * 20)
  prepared = moejax(tmp_path, "data", "prepare", "--config=config.py")
  assert prepared.returncode == 0, prepared.stderr
  done = moejax(
    tmp_path, "train", "--config=config.py", f"--workdir={unbroken}"
  )
  assert done.returncode == 2
  assert "the data changed since step 40" in done.stderr


def test_a_damaged_newest_checkpoint_is_passed_over(place, unbroken):
  import shutil

  run = place / "damaged"
  shutil.copytree(unbroken, run)
  step = CheckpointReader(run / "checkpoints").latest()
  files = [
    p for p in (run / "checkpoints" / str(step) / "arrays").rglob("*")
    if p.is_file() and p.stat().st_size > 1000
  ]  # fmt: skip
  data = bytearray(files[0].read_bytes())
  data[len(data) // 2] ^= 4
  files[0].write_bytes(data)
  done = train(place, "damaged")
  assert done.returncode == 0, done.stderr
  assert files[0].name in done.stderr
  assert_same_run(run, unbroken)


def test_print_config_needs_no_workdir(place):
  done = moejax(
    place, "train", "--config=config.py", "--print-config",
    "--config.model.d_model=48",
  )  # fmt: skip
  assert done.returncode == 0
  assert json.loads(done.stdout)["model"]["d_model"] == 48
  config = parse_config(str(place / "config.py"), ["--config.model.d_model=48"])
  assert json.loads(done.stdout) == json.loads(json.dumps(config.to_dict()))


def test_a_run_goes_on_without_naming_its_config(place, unbroken):
  done = moejax(place, "train", "--workdir=unbroken")
  assert done.returncode == 0, done.stderr
  assert "already trained" in done.stdout


def test_evaluation_and_generation_from_the_run(place, unbroken):
  done = moejax(place, "eval", "unbroken", "--json")
  assert done.returncode == 0, done.stderr
  values = json.loads(done.stdout)
  logged = json.loads(lines(unbroken, "eval.jsonl")[-1])
  np.testing.assert_allclose(values["xent"], logged["validation/xent"], 1e-5)
  files = moejax(place, "eval", "unbroken", "--data=text/1*.txt", "--json")
  assert files.returncode == 0, files.stderr
  assert json.loads(files.stdout)["xent"] < 3.5
  text = moejax(
    place, "generate", "unbroken", "--prompt=the ", "--max-tokens=8",
    "--temperature=0",
  )  # fmt: skip
  assert text.returncode == 0, text.stderr
  assert text.stdout.startswith("the ")


@pytest.mark.parametrize(
  "overrides,message",
  [
    (["--config.model.num_layer=3"], "did you mean 'model.num_layers'?"),
    (["--config.model.num_layers=three"], "must be int"),
    (["--config.model.num_kv_heads=3"], "use num_kv_heads=2"),
    (["--config.model.moe.router=top_k(k=9)"], "use k <= 4"),
    (["--config.model.moe.router=topk(k=2)"], "no router 'topk'"),
    (["--config.model.vocab_size=100"], "vocab_size=100 holds fewer; use 384"),
    (["--config.data.sources=nowhere"], "nowhere"),
    (["--config.data.seq_len=64"], "moejax data prepare"),
    (["--config.data.tokenizer=missing.json"], "missing.json"),
    (["--config.optimizer.no_decay=scael"], "matches no parameter"),
    (["--confg.seed=1"], "unknown argument"),
    (["--config.train.accumulation_steps=3"], "use 2"),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(place, overrides, message):
  done = train(place, "bad", *overrides)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1, done.stderr
  assert not (place / "bad" / "config.json").exists()
