# SPDX-License-Identifier: Apache-2.0
"""Phases: what holds when, exact under any stop, one program a shape."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses, memory
from moejax.__main__ import main
from moejax.cli import parse_config
from moejax.config import (
  Config,
  config_after,
  default_config,
  phase_at,
  phases_of,
  require_mesh_fits,
)
from moejax.data import PhasedStores, load_tokenizer, open_stores
from moejax.errors import CheckpointError, ConfigError
from moejax.models import build, init_variables
from moejax.optimizer import make_schedule, schedule_values
from moejax.phases import at_step, shaped_like
from moejax.resume import check_same_run
from moejax.runs import load_run
from moejax.step import BATCH_KEYS, batch_sums
from moejax.train import train
from tests.small_run import make_place
from tests.test_train import assert_same_run, lines

PHASES = [
  {"name": "main", "steps": 9},
  {
    "name": "mix", "tokens": 6 * 4 * 32,
    "options": {"data.weights": (1.0, 3.0), "loss.load_balance": 0.0},
  },
  {
    "name": "long", "steps": 7,
    "options": {
      "data.seq_len": 64, "train.batch_size": 2, "model.rope_theta": 1e6
    },
  },
  {
    "name": "anneal",
    "options": {
      "data.order": 1, "optimizer.learning_rate": 1e-3,
      "optimizer.schedule.name": "linear", "optimizer.schedule.final": 0.0,
      "optimizer.schedule.warmup": 0.0, "loss.z_loss": 0.001,
    },
  },
]  # fmt: skip
ENDS = [9, 15, 22, 30]
OPTIONS = [
  "--config=config.py", "--config.train.num_steps=30",
  "--config.data.sources=text,more", "--config.data.weights=3,1",
  "--config.optimizer.schedule.decay=0", "--config.eval.sample_tokens=0",
  "--config.checkpoint.keep_every=5",
]  # fmt: skip


def options(phases=PHASES, **more):
  found = [*OPTIONS, f"--config.train.phases={json.dumps(phases)}"]
  return found + [f"--config.{k.replace('__', '.')}={more[k]}" for k in more]


def config_of(phases=PHASES, **more):
  return parse_config("config.py", options(phases, **more)[1:])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = make_place(tmp_path_factory.mktemp("phases"))
  (place / "more").mkdir()
  for i in range(40):
    text = " ".join(str(j * i) for j in range(2 * i))
    (place / "more" / f"{i}.txt").write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    assert main(["data", "prepare", *options()]) == 0
  return place


@pytest.fixture(autouse=True)
def within(place, monkeypatch):
  monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def unbroken(place):
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    assert train(config_of(), "unbroken", report=False) == 0
  return place / "unbroken"


def test_which_holds_when():
  config = config_of()
  phases = phases_of(config)
  assert [p.end for p in phases] == ENDS
  assert [phase_at(config, s).name for s in (0, 8, 9, 15, 29, 30)] == [
    "main", "main", "mix", "long", "anneal", "anneal"
  ]  # fmt: skip
  assert config_after(config, 9).data.weights == (3.0, 1.0)
  assert config_after(config, 10).data.weights == (1.0, 3.0)
  assert phases[2].config.model.rope_theta == 1e6
  assert phases[3].config.model.rope_theta == config.model.rope_theta
  again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
  assert again == config


def test_schedules_follow_each_other():
  config = config_of()
  rates = schedule_values(config)
  first = dataclasses.replace(
    config, train=dataclasses.replace(config.train, phases=(), num_steps=22)
  )
  np.testing.assert_array_equal(rates[:22], schedule_values(first))
  np.testing.assert_allclose(
    rates[22:], 1e-3 * (1 - np.arange(1, 9) / 8), atol=1e-9
  )
  anneal = phases_of(config)[3].config.optimizer
  steps = jnp.arange(8)
  np.testing.assert_array_equal(
    rates[22:], jax.vmap(make_schedule(anneal, 8))(steps)
  )


@pytest.mark.parametrize("stops", [ENDS[:3], [8, 10, 14], [16, 21]])
def test_a_stop_anywhere_changes_nothing(place, unbroken, stops):
  """Also one right before, at and after a switch."""
  name = f"stopped_{stops[0]}"
  for stop in (*stops, 30):
    assert train(config_of(train__num_steps=stop), name, report=False) == 0
  # A trial's end is evaluated too, where the whole run is not.
  assert_same_run(place / name, unbroken, but=("eval.jsonl",))
  steps = {
    json.loads(line)["step"]: line for line in lines(place / name, "eval.jsonl")
  }
  for line in lines(unbroken, "eval.jsonl"):
    assert steps[json.loads(line)["step"]] == line


def test_phases_that_set_nothing_change_nothing(place):
  none = [{"name": "a", "steps": 7}, {"name": "b", "steps": 5}, {"name": "c"}]
  runs = {"whole": [], "parts": none}
  for name, phases in runs.items():
    # Rows of a phase are no multiple of what this mixture repeats after.
    mixture = {"data__weights": "9,1"}
    config = config_of(phases, train__num_steps=20, **mixture)
    assert train(config, name, report=False) == 0
  whole, parts = (
    [json.loads(line) for line in lines(place / name)] for name in runs
  )
  assert [row.pop("phase") for row in parts] == [0] * 7 + [1] * 5 + [2] * 8
  assert whole == parts


def test_the_phase_of_each_line_and_what_it_mixes(unbroken):
  rows = [json.loads(line) for line in lines(unbroken)]
  assert [r["phase"] for r in rows] == [0] * 9 + [1] * 6 + [2] * 7 + [3] * 8
  stores = PhasedStores.open(config_of(), load_tokenizer("byte"))
  phases = phases_of(config_of())
  # 36 rows of 3 to 1, then 24 of 1 to 3, on in the same stream.
  assert stores.rows_read(phases[0], 9) == (27, 9)
  assert stores.rows_read(phases[1], 15) == (33, 27)
  assert stores.rows_read(phases[2], 22) == (11, 3)
  seen = set()
  for phase in phases[:2]:
    with stores.batches(phase, phase.start) as batches:
      for _ in range(phase.end - phase.start):
        batch = next(batches)
        seen |= set(zip(batch["source"].tolist(), batch["row"].tolist()))
  epochs = [s.rows("train") for s in stores.stores[0].stores]
  assert len(seen) == min(33, epochs[0]) + min(27, epochs[1])


def test_one_program_a_shape(monkeypatch):
  compiled = []
  make = memory.compile_step
  monkeypatch.setattr(
    memory, "compile_step", lambda *args: compiled.append(1) or make(*args)
  )
  assert train(config_of(), "programs", report=False) == 0
  assert len(compiled) == 2


STRETCHED = [
  {"name": "a", "steps": 5, "options": {"model.rope_scaling": "none"}},
  {"name": "b", "options": {"model.rope_scaling": "linear(factor=2.0)"}},
]


@pytest.mark.parametrize(
  "phases, steps",
  # To the end, and to that of a phase: those to come do not count.
  [(PHASES, 0), (STRETCHED, 0), (STRETCHED, 5), (STRETCHED[1:], 0)],
)
def test_a_phase_computes_what_its_config_says(phases, steps):
  config = config_of(phases, model__rope_scaling="ntk(alpha=50.0)")
  if steps:
    train = dataclasses.replace(config.train, num_steps=steps)
    config = dataclasses.replace(config, train=train)
  rng = np.random.default_rng(0)
  for phase in phases_of(config):
    B, T = phase.config.train.batch_size, phase.config.data.seq_len
    ids = rng.integers(0, 250, (B, T)).astype(np.int32)
    batch = dict.fromkeys(BATCH_KEYS, ids) | {
      "segment_ids": np.ones((B, T), np.int32),
      "loss_mask": np.ones((B, T), bool),
      "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    model = build(config.model)
    variables = init_variables(model, jax.random.key(0))
    shaped = shaped_like(config, phase)

    @jax.jit
    def by_step(step, variables, shaped=shaped, model=model, batch=batch):
      at = at_step(shaped, step)
      sums, stats = batch_sums(shaped, model, variables, batch, None, at)
      return losses.total_loss(shaped.loss, sums, stats, at.loss)[0]

    own = build(phase.config.model)
    sums, stats = batch_sums(phase.config, own, variables, batch, None)
    want, _ = losses.total_loss(phase.config.loss, sums, stats)
    for step in (phase.start, phase.end - 1):
      got = by_step(step, variables)
      np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_generates_is_the_phase_of_the_checkpoint(unbroken):
  assert load_run(unbroken, 20).config.model.rope_theta == 1e6
  assert load_run(unbroken).config.model.rope_theta == 10_000


def test_what_may_change_later():
  config = config_of()
  meta = {"config": config.to_dict(), "step": 15}
  later = [*PHASES[:2], {"name": "other"}]
  check_same_run(config_of(later), meta)
  check_same_run(config_of(PHASES[:2] + [{"name": "x", "steps": 1}, PHASES[3]]),
                 meta)  # fmt: skip
  shorter = [PHASES[0] | {"steps": 8}, *PHASES[1:]]
  with pytest.raises(
    CheckpointError, match="begin other phases before step 15"
  ):
    check_same_run(config_of(shorter), meta)
  mixed = json.loads(json.dumps(PHASES))
  mixed[1]["options"]["data.weights"] = [1.0, 1.0]
  with pytest.raises(CheckpointError, match="phase mix has begun and would"):
    check_same_run(config_of(mixed), meta)
  check_same_run(config_of(mixed), meta | {"step": 9})


BAD = [
  ([{"name": "a", "steps": 60}], "is the last and ends at train.num_steps"),
  ([{"name": "a"}, {"name": "b"}], "phase a has no length"),
  ([{"name": "a", "steps": 5}, {"name": "a"}], "repeats one"),
  ([{"name": "a", "steps": 5, "tokens": 9.0}, {"name": "b"}], "give one of"),
  ([{"name": "a", "options": {"loss.loadbalance": 1.0}}],
   "cannot set loss.loadbalance; did you mean 'loss.load_balance'"),
  ([{"name": "a", "options": {"data.seq_len": 3.5}}], "must be int"),
  ([{"name": "a", "options": {"train.batch_size": 0}}],
   "phase a: train.batch_size=0 must be positive"),
  ([{"name": "a", "steps": 29},
    {"name": "b", "options": {"optimizer.schedule.warmup": 5.0}}],
   "do not fit in the 1 steps from step 29 on"),
  ([{"name": "a", "options": {"model.rope_scaling":
      "yarn(factor=2.0, original=16, beta_fast=2.0, beta_slow=1.0, mscale=1.0, "
      "mscale_all_dim=1.0)"}}], "yarn also scales attention's scores"),
  ([{"nme": "a"}], "no key 'nme'"),
  ([{"steps": 3}], "has no name"),
  (["x"], "must be a dictionary with a name"),
]  # fmt: skip


@pytest.mark.parametrize("phases, message", BAD)
def test_bad_phases_are_one_line(phases, message):
  with pytest.raises(ConfigError, match=message):
    config_of(phases)


def test_phases_that_the_run_does_not_reach():
  config = config_of(train__num_steps=12)
  assert [p.name for p in phases_of(config)] == ["main", "mix"]
  assert phases_of(config)[-1].end == 12


def test_a_config_file_writes_dictionaries():
  config = default_config()
  config.train.phases = ({"name": "a", "steps": 3}, {"name": "b"})
  assert phases_of(Config.from_dict(config))[0].end == 3


def test_a_missing_store_of_a_later_phase_is_said_at_the_start(place, capsys):
  phases = [{"name": "a", "steps": 20},
            {"name": "b", "options": {"data.seq_len": 128}}]  # fmt: skip
  assert main(["train", *options(phases), "--workdir=missing"]) == 2
  assert "moejax data prepare" in capsys.readouterr().err
  with pytest.raises(Exception, match="seq_len=128"):
    open_stores(phases_of(config_of(phases))[1].config.data,
                load_tokenizer("byte"))  # fmt: skip


def test_a_decay_branches_from_any_stable_checkpoint(place):
  """As if the run had been to decay from the start."""
  decay = {"optimizer__schedule__decay": 6, "train__num_steps": 21}
  assert train(config_of([], train__num_steps=20), "stable", report=False) == 0
  assert train(config_of([], **decay), "decayed", report=False) == 0
  branch = config_of([], **decay, train__branch_from="stable:15")
  assert train(branch, "branch", report=False) == 0
  assert_same_run(place / "branch", place / "decayed")


@pytest.mark.parametrize(
  "more, message",
  [
    ({"train__branch_from": "nowhere:5"}, "nowhere"),
    ({"train__branch_from": "stable:16"}, "no such checkpoint; there are"),
    ({"train__branch_from": "stable:15", "train__batch_size": 8},
     "train.batch_size: 4 -> 8"),
    ({"train__branch_from": "stable:15", "optimizer__schedule__decay": 10},
     "would change the learning rate of steps already done"),
    ({"train__branch_from": "stable", "train__init_from": "stable"},
     "give one of them"),
  ],
)  # fmt: skip
def test_bad_branches(place, capsys, more, message):
  if not (place / "stable").exists():
    train(config_of([], train__num_steps=20), "stable", report=False)
  more = {"train__num_steps": 21} | more
  args = ["train", *options([], **more), "--workdir=bad"]
  assert main(args) == 2
  assert message in capsys.readouterr().err
  assert not (place / "bad" / "config.json").exists()


def test_a_run_begun_with_weights_can_be_branched(place, unbroken):
  """What it began with is in its state, and no option of the branch."""
  begun = {"train__init_from": unbroken.name, "train__num_steps": 5}
  assert train(config_of([], **begun), "begun", report=False) == 0
  more = {"train__branch_from": "begun", "train__num_steps": 7}
  assert train(config_of([], **more), "branched", report=False) == 0
  assert len(lines(place / "branched")) == 7
  with pytest.raises(CheckpointError, match=r"train.init_from: 'unb.*' -> ''"):
    train(config_of([], train__num_steps=7), "begun", report=False)


def test_a_launch_may_stop_on_the_way(place, unbroken, capsys):
  """The end, and so the learning rate, is that of the whole run."""
  args = ["train", *options(), "--workdir=halts", "--no-report"]
  assert main([*args, "--stop-at=12"]) == 0
  assert "stopped at step 12 of 30, saved; without" in capsys.readouterr().out
  assert len(lines(place / "halts")) == 12
  assert main([*args, "--stop-at=12"]) == 0
  assert "already trained to step 12; --stop-at" in capsys.readouterr().out
  assert main([*args, "--stop-at=14", "--profile=20:21"]) == 0
  said = capsys.readouterr().out
  assert "note: --profile=20:21 begins after --stop-at=14" in said
  assert main(args) == 0
  assert_same_run(place / "halts", unbroken)
  assert main([*args, "--stop-at=0"]) == 2
  assert "--stop-at=0 must be a step" in capsys.readouterr().err


def test_only_what_is_to_be_trained_now_must_fit_on_the_mesh():
  config = config_of(parallel__data=4)  # the third phase has batches of two
  for start, end in ((0, 15), (22, 30)):
    require_mesh_fits(config, start, end)
  for start, said in (
    (0, "--stop-at=15, and"),
    (15, "); use another --config"),
  ):
    with pytest.raises(ConfigError, match=re.escape(said)):
      require_mesh_fits(config, start, 30)


def test_a_phase_that_the_mesh_does_not_divide(capsys):
  more = {"parallel__data": 4, "parallel__tensor": 2, "model__vocab_size": 260}
  config = config_of(**more)  # planned and described all the same
  assert phases_of(config)[2].config.parallel.data == 1
  assert main(["train", *options(**more), "--workdir=mesh"]) == 2
  error = capsys.readouterr().err
  assert "phase long does not fit on this mesh" in error
  assert "stop before it with --stop-at=15, and go on with another" in error
