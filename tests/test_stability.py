# SPDX-License-Identifier: Apache-2.0
"""A step that is not taken changes nothing, and the next one is as if it had
never been."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.__main__ import main
from moejax.cli import parse_config
from moejax.config import StabilityConfig
from moejax.models import build
from moejax.stability import NOT_FINITE, SPIKE, TAKEN, Guard
from moejax.step import BATCH_KEYS, init_state, make_train_step
from moejax.train import train
from tests.small_run import make_place
from tests.test_train import assert_same_run, lines

# Gives NaN to each q that does not begin a document; only bad texts have one.
ROUTER = """
import jax
from moejax.routing import top_k


def broken(logits_TE, mask_T, *, k, token_T, position_T, rng=None):
  routing = top_k(logits_TE, mask_T, k=k)
  bad_T = (token_T == ord("q")) & (position_T > 0)
  bad_A = bad_T[routing.token_A]
  nan = jax.numpy.float32("nan")
  weight_A = jax.numpy.where(bad_A, nan, routing.weight_A)
  return routing.replace(weight_A=weight_A)
"""


def verdicts(config, losses):
  """Of losses in turn; gradient norms are 1."""
  guard, found = Guard.fresh(config), []
  for loss in losses:
    verdict = guard.verdict(config, jnp.float32(loss), jnp.float32(1))
    guard = guard.after(verdict, jnp.float32(loss), jnp.float32(1))
    found.append(int(verdict))
  return found, guard


def test_spikes_against_a_plain_loop():
  config = StabilityConfig(spike=3.0, window=8)
  rng = np.random.default_rng(0)
  losses = rng.normal(5, 0.1, 60).astype(np.float32)
  losses[[20, 31, 32]] = [9.0, np.nan, 7.0]
  want, taken = [], []
  for loss in losses:
    window = np.array(taken[-8:], np.float64)
    verdict = TAKEN
    if not np.isfinite(loss):
      verdict = NOT_FINITE
    elif len(taken) >= 4 and loss > window.mean() + 3 * window.std(ddof=1):
      verdict = SPIKE
    if verdict == TAKEN:
      taken.append(loss)
    want.append(verdict)
  found, guard = verdicts(config, losses)
  assert found == want
  assert found[20] == found[32] == SPIKE and found[31] == NOT_FINITE
  assert int(guard.skipped) == sum(v != TAKEN for v in want)
  assert int(guard.taken) == len(taken)


def test_nan_does_not_poison_the_window():
  config = StabilityConfig(spike=3.0, window=8)
  rng = np.random.default_rng(1)
  losses = rng.normal(5, 0.1, 40)
  losses[10:13] = np.nan
  found, guard = verdicts(config, losses)
  assert found[10:13] == [NOT_FINITE] * 3
  assert found[13] == TAKEN and int(guard.in_a_row) == 0


def test_a_phase_begins_a_window_anew(place):
  """Its losses are on another level, and other weights are no spike."""
  phases = json.dumps([
    {"name": "a", "steps": 14},
    {"name": "b", "options": {"loss.load_balance": 50.0, "data.order": 3}},
  ])  # fmt: skip
  config = config_of(
    train__phases=phases, data__sources="text", data__weights="1",
    stability__spike=6, stability__window=8,
  )  # fmt: skip
  assert train(config, "phased", report=False) == 0
  rows = [json.loads(line) for line in lines(place / "phased")]
  assert rows[14]["loss/total"] > 5 * rows[13]["loss/total"]
  assert not any(row["skipped"] for row in rows[14:])
  stability = StabilityConfig(spike=3.0, window=8)
  _, guard = verdicts(stability, np.random.default_rng(0).normal(5, 0.1, 20))
  high, norm = jnp.float32(9), jnp.float32(1)
  assert guard.verdict(stability, high, norm) == SPIKE
  assert guard.anew(True).verdict(stability, high, norm) == TAKEN
  assert guard.anew(False).verdict(stability, high, norm) == SPIKE


def test_without_spikes_there_is_no_window():
  found, guard = verdicts(StabilityConfig(), [1.0, 1e30, np.inf, np.nan])
  assert found == [TAKEN, TAKEN, NOT_FINITE, NOT_FINITE]
  assert guard.loss_W is None and int(guard.in_a_row) == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("stability"))
  (place / "broken_router.py").write_text(ROUTER)
  (place / "bad").mkdir()
  for i in range(3):
    (place / "bad" / f"{i}.txt").write_text(f"zq {'ab ' * 40} {i}")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    both = "--config.data.sources=text,bad"
    assert main(["data", "prepare", "--config=config.py", both]) == 0
  return place


@pytest.fixture(autouse=True)
def within(place, monkeypatch):
  monkeypatch.chdir(place)


def config_of(**more):
  options = {
    "model.moe.router": "broken_router.broken(k=2)",
    "data.sources": "text,bad", "data.weights": "30,1",
    "train.num_steps": 24, "eval.every": 0, "checkpoint.every": 4,
    "optimizer.ema": 0.9,
  } | {k.replace("__", "."): v for k, v in more.items()}  # fmt: skip
  return parse_config(
    "config.py", [f"--config.{k}={v}" for k, v in options.items()]
  )


def test_a_skipped_step_changes_nothing():
  config = config_of()
  model = build(config.model)
  step = jax.jit(make_train_step(config, model))
  state = init_state(config, model)
  B, T = 4, 32
  tokens = np.random.default_rng(0).integers(97, 112, (B, T)).astype(np.int32)
  batch = dict.fromkeys(BATCH_KEYS, tokens) | {
    "segment_ids": np.ones((B, T), np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "loss_mask": np.ones((B, T), bool),
  }
  bad = batch | {"tokens": tokens.copy()}
  bad["tokens"][2, 1] = ord("q")
  state, _ = step(state, batch)
  after, metrics = step(state, bad)
  assert metrics["skipped"] == NOT_FINITE and np.isnan(metrics["loss/total"])
  kept = ("params", "opt_state", "router_state", "rng", "ema")
  for name in kept:
    jax.tree.map(
      np.testing.assert_array_equal,
      *(jax.device_get(jax.tree.map(_bits, getattr(s, name)))
        for s in (state, after)),
    )  # fmt: skip
  assert int(after.step) == int(state.step) + 1
  _, metrics = step(after, batch)
  assert metrics["skipped"] == TAKEN and metrics["skipped_in_a_row"] == 0


def _bits(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(x) if is_key else x


def test_a_run_skips_says_so_and_resumes_exactly(place, capsys):
  assert train(config_of(), "whole", report=False) == 0
  said = capsys.readouterr().out
  skipped = [
    json.loads(line) for line in lines(place / "whole", "skipped.jsonl")
  ]
  assert skipped and all(row["reason"] == NOT_FINITE for row in skipped)
  assert all(any(source == 1 for source, _ in r["rows"]) for r in skipped)
  first = skipped[0]["step"]
  assert f"step {first} is skipped: its loss or gradient is not finite" in said
  rows = [json.loads(line) for line in lines(place / "whole")]
  assert [r["step"] for r in rows if r["skipped"]] == [
    r["step"] for r in skipped
  ]
  # Learning goes on afterwards: nearly all steps are taken, none is "NaN".
  taken = {r["step"]: r["loss/xent"] for r in rows if not r["skipped"]}
  assert len(taken) >= 20 and 1 < first < max(taken)
  assert all(isinstance(loss, float) for loss in taken.values())
  assert taken[max(taken)] < taken[first - 1] - 0.2
  for stop in (first, 24):  # right after a skipped step
    config = config_of(train__num_steps=stop, optimizer__schedule__decay=0)
    assert train(config, "stopped", report=False) == 0
  config = config_of(optimizer__schedule__decay=0)
  assert train(config, "flat", report=False) == 0
  assert_same_run(place / "stopped", place / "flat")


def test_too_many_in_a_row_end_the_run(place, capsys):
  args = ["train", "--config=config.py", "--workdir=ended"]
  for option in ("model.moe.router=broken_router.broken(k=2)",
                 "data.sources=bad", "eval.every=0",
                 "stability.max_skipped=3"):  # fmt: skip
    args.append(f"--config.{option}")
  assert main(args) == 2
  error = capsys.readouterr().err
  assert "3 steps in a row were skipped, the last at step" in error
  assert "moejax replay ended --step=" in error or "before any" in error
  assert len(lines(place / "ended")) < 24


def test_replay_shows_the_layer_and_the_row(place, capsys):
  assert train(config_of(), "to_replay", report=False) == 0
  row = json.loads(lines(place / "to_replay", "skipped.jsonl")[0])
  metrics = [json.loads(line) for line in lines(place / "to_replay")]
  capsys.readouterr()
  for step in (row["step"], row["step"] - 1):
    assert main(["replay", "to_replay", f"--step={step}"]) == 0
    said = capsys.readouterr().out
    if step == row["step"]:
      assert "skipped: its loss or gradient is not finite" in said
      assert "first output that is not finite: repeats_0/block_0/moe" in said
      (bad,) = [r for s, r in row["rows"] if s == 1][:1]
      assert f"nan  bad row {bad}" in said
    else:
      assert "taken" in said and "NOT FINITE" not in said
      norm = metrics[step - 1]["grad_norm"]
      shown = next(x for x in said.splitlines() if "grad_norm" in x)
      assert float(shown.split()[1]) == pytest.approx(norm, rel=1e-5)
  assert main(["replay", "to_replay", "--step=99"]) == 2
  assert "--step=99 is not in [1, 24]" in capsys.readouterr().err


def test_replay_of_microbatches(place, capsys):
  config = config_of(train__accumulation_steps=2, train__num_steps=16)
  assert train(config, "microbatches", report=False) == 0
  assert main(["replay", "microbatches", "--step=7"]) == 0
  said = capsys.readouterr().out
  assert said.count(" row ") >= 4 and "gradient norm" in said


def test_replay_refuses_a_step_that_the_run_never_came_to(place, capsys):
  """Of 40 steps it did 6; the seventh may be the one in which it died."""
  config = config_of(train__num_steps=6, optimizer__schedule__decay=0)
  assert train(config, "died", report=False) == 0
  path = place / "died" / "config.json"
  record = json.loads(path.read_text())
  record["config"]["train"]["num_steps"] = 40
  path.write_text(json.dumps(record))
  capsys.readouterr()
  assert main(["replay", "died", "--step=8"]) == 2
  assert "--step=8: the run has done 6 steps" in capsys.readouterr().err
  for step in (6, 7):
    assert main(["replay", "died", f"--step={step}"]) == 0
    said = capsys.readouterr().out
    assert f"step {step}\n" in said
    assert ("not in the run's log" in said) == (step == 7)
