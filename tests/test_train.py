# SPDX-License-Identifier: Apache-2.0
"""The main job end to end, as a user runs it: in processes that get killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from moejax import runs
from moejax.__main__ import main
from moejax.checkpoint import CheckpointReader, state_digest
from moejax.cli import parse_config
from moejax.convert import load_hf
from moejax.data import load_tokenizer, open_stores
from moejax.evaluate import validation_batches
from moejax.models import build
from moejax.step import init_state
from tests.small_run import command, environment, make_place, moejax


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def unbroken(place):
  """A run that nothing happened to."""
  done = subprocess.run(
    command("train", "--config=config.py", "--workdir=unbroken", page=True),
    cwd=place, env=environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return place / "unbroken"


def train(place, workdir, *overrides):
  return moejax(
    place, "train", "--config=config.py", f"--workdir={workdir}", *overrides
  )


def digest(run):
  config = runs.read_config(run)
  abstract = runs.on_device(
    jax.eval_shape(lambda: init_state(config, build(config.model)))
  )
  restored = CheckpointReader(runs.checkpoint_folder(run)).restore(abstract)
  return restored.step, state_digest(restored.state)


def lines(run, name="metrics.jsonl"):
  return (run / name).read_text().splitlines()


def assert_same_run(run, unbroken, but=()):
  assert digest(run) == digest(unbroken)
  logs = "metrics eval router_load samples".split()
  for name in (f"{log}.jsonl" for log in logs):
    if name not in but and (unbroken / name).exists():
      assert lines(run, name) == lines(unbroken, name), name


def test_a_run_leaves_what_it_should(unbroken):
  metrics = [json.loads(line) for line in lines(unbroken)]
  assert [m["step"] for m in metrics] == list(range(1, 41))
  assert metrics[-1]["loss/xent"] < metrics[0]["loss/xent"] - 1
  assert metrics[-1]["router/dropped"] == 0
  for name in ("eval.jsonl", "samples.jsonl"):
    steps = [json.loads(line)["step"] for line in lines(unbroken, name)]
    assert steps == [15, 30, 40], name
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
  out, _ = process.communicate(timeout=300)
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
  limit = time.monotonic() + 600
  while process.poll() is None:
    if path.exists() and len(path.read_bytes().splitlines()) >= step:
      return
    assert time.monotonic() < limit, f"{run} has not come to step {step}"
    time.sleep(0.02)


def test_a_finished_run_says_so_and_can_be_extended(place, unbroken):
  again = train(place, "unbroken")
  assert again.returncode == 0
  assert "already trained to step 40; its learning rate has" in again.stdout
  short = train(
    place, "extended", "--config.train.num_steps=25",
    "--config.optimizer.schedule.decay=0",
  )  # fmt: skip
  assert short.returncode == 0
  same = train(
    place, "extended", "--config.train.num_steps=25",
    "--config.optimizer.schedule.decay=0",
  )  # fmt: skip
  assert "step 25; raise train.num_steps to go on" in same.stdout
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


def test_fewer_steps_than_are_done_are_refused(place, unbroken):
  done = train(place, "unbroken", "--config.train.num_steps=20")
  assert done.returncode == 2
  assert "num_steps=20, and the run is at step 40 already" in done.stderr
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


def test_the_end_is_evaluated_before_it_is_saved(unbroken):
  """Else a kill between the two would lose the evaluation for good."""
  saved = (unbroken / "checkpoints" / "40" / "manifest.json").stat().st_mtime_ns
  for name in ("eval.jsonl", "samples.jsonl"):
    assert (unbroken / name).stat().st_mtime_ns <= saved


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
  place, unbroken
):
  run = place / "all_damaged"
  shutil.copytree(unbroken, run)
  for path in run.glob("checkpoints/*/manifest.json"):
    path.write_text(path.read_text().replace("a", "b", 1))
  before = lines(run)
  done = train(place, "all_damaged")
  assert done.returncode == 2
  assert "no intact checkpoint" in done.stderr
  assert lines(run) == before


def test_diverged_parameters_are_never_saved(place):
  done = train(
    place, "diverged", "--config.optimizer.learning_rate=1e38",
    "--config.checkpoint.every=1", "--config.eval.every=0",
  )  # fmt: skip
  assert done.returncode == 2
  assert "in a new --workdir" in done.stderr.splitlines()[-1]
  reader = CheckpointReader(place / "diverged" / "checkpoints")
  model = build(parse_config(str(place / "config.py"), []).model)
  abstract = runs.abstract_variables(model)
  for step in reader.steps():
    params = reader.restore_params(abstract, step).state["params"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), step


def test_a_mesh_that_drops_rows_does_not_in_evaluation(place, monkeypatch):
  two = "--xla_force_host_platform_device_count=2"
  monkeypatch.setenv("XLA_FLAGS", two)
  done = train(
    place, "dropping", "--config.train.num_steps=15",
    "--config.parallel.expert=2", "--config.parallel.receive_factor=1.0",
    "--config.model.moe.router=top_k(k=1)", "--config.loss.load_balance=0.0",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  steps = [json.loads(line) for line in lines(place / "dropping")]
  assert all(step["router/dropped"] > 0.1 for step in steps)
  monkeypatch.delenv("XLA_FLAGS")
  alone = moejax(place, "eval", "dropping", "--json")
  assert alone.returncode == 0, alone.stderr
  logged = json.loads(lines(place / "dropping", "eval.jsonl")[-1])
  want = json.loads(alone.stdout)["xent"]
  assert logged["validation/xent"] == pytest.approx(want, rel=2e-6)


def test_accumulation_does_not_change_what_is_evaluated(place, monkeypatch):
  monkeypatch.chdir(place)
  rows = []
  for steps in (1, 4):
    config = parse_config(
      "config.py", [f"--config.train.accumulation_steps={steps}"]
    )
    stores = open_stores(config.data, load_tokenizer("byte"))
    batches = list(validation_batches(config, build(config.model), stores, 2))
    assert all(len(batch["row"]) == 4 // steps for batch in batches)
    rows.append(np.concatenate([batch["row"] for batch in batches]))
  np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize(
  "words,message",
  [
    (["eval", "unbroken", "--num-batches=-1"], "--num-batches=-1 must be"),
    (["eval", "unbroken", "--step=-1"], "available steps: 35, 40"),
    (["eval", "unbroken", "--step=7"], "available steps: 35, 40"),
    (["generate", "unbroken", "--seed=99999999999999999999"], "--seed="),
    (["generate", "nowhere"], "not the folder of a run"),
  ],
  ids=" ".join,
)
def test_bad_requests_of_a_run(
  place, unbroken, words, message, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  assert main(words) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_a_router_that_cannot_generate_trains_without_samples(place):
  """It failed at the first evaluation, and again after each restart."""
  router = "expert_choice(k=2,group_size=32)"
  done = train(place, "ahead", f"--config.model.moe.router={router}")
  assert done.returncode == 0, done.stderr
  assert "note: no samples: router" in done.stdout
  assert len(lines(place / "ahead", "eval.jsonl")) == 3
  assert not (place / "ahead" / "samples.jsonl").exists()


def test_averaged_weights_are_evaluated_and_exported(place, unbroken):
  options = ("--config.optimizer.ema=0.9", "--config.eval.ema=True",
             "--config.train.num_steps=20",
             "--config.checkpoint.keep_every=5")  # fmt: skip
  done = train(place, "averaged", *options)
  assert done.returncode == 0, done.stderr
  run = place / "averaged"
  # Against the average of the weights that checkpoints have, every step saved.
  every = train(place, "every", *options, "--config.checkpoint.every=1",
                "--config.checkpoint.keep_every=1")  # fmt: skip
  assert every.returncode == 0, every.stderr
  assert digest(run) == digest(place / "every")
  fresh = init_state(runs.read_config(run), build(runs.read_config(run).model))
  want = fresh.params
  for step in range(1, 21):
    params = runs.load_run(place / "every", step).variables["params"]
    want = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, want, params)
  got = runs.load_run(run, ema=True)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    got.variables["params"], want,
  )  # fmt: skip
  row = json.loads(lines(run, "eval.jsonl")[-1])
  shown = moejax(place, "eval", "averaged", "--ema", "--json")
  assert json.loads(shown.stdout)["xent"] == pytest.approx(
    row["validation_ema/xent"], rel=1e-6
  )
  assert row["validation_ema/xent"] != row["validation/xent"]
  assert moejax(place, "convert", "to-hf", "averaged", "hub", "--ema",
                "--step=20").returncode == 0  # fmt: skip
  _, there = load_hf(place / "hub")
  np.testing.assert_array_equal(
    there["params"]["w_embed_VD"], got.variables["params"]["w_embed_VD"]
  )
  none = moejax(place, "eval", unbroken.name, "--ema")
  assert none.returncode == 2
  assert "keeps no average" in none.stderr
