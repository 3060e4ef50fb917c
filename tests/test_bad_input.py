# SPDX-License-Identifier: Apache-2.0
"""What cannot be trained is refused in one line, before anything is written."""

import re

import jax
import pytest

from moejax import memory
from moejax.__main__ import main
from moejax.cli import parse_config
from moejax.config import phases_of
from moejax.errors import ConfigError
from moejax.parallel import build_on_mesh, make_mesh
from moejax.step import abstract_state, state_shardings
from tests.small_run import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("bad_input"))


@pytest.mark.parametrize(
  "overrides,message",
  [
    (["--config.model.num_layer=3"], "did you mean 'model.num_layers'?"),
    (["--config.model.num_layers=three"], "must be int"),
    (["--config.model.num_kv_heads=3"], "use num_kv_heads=2"),
    (["--config.model.moe.router=top_k(k=9)"], "use 1 <= k <= 4"),
    (["--config.model.moe.router=topk(k=2)"], "no router 'topk'"),
    (["--config.model.vocab_size=100"], "vocab_size=100 holds fewer; use 384"),
    (["--config.data.sources=nowhere"], "nowhere"),
    (["--config.data.seq_len=64"], "moejax data prepare"),
    (["--config.data.tokenizer=missing.json"], "missing.json"),
    (["--config.optimizer.no_decay=scael"], "matches no parameter"),
    (["--confg.seed=1"], "unknown argument"),
    (["--config.train.accumulation_steps=3"], "use 2"),
    (["--config.model.moe.router=top_k(k=2,score='foo')"], "score='foo' is"),
    (["--config.model.moe.router=top_k(k=1,renormalize=True)"], "no gradient"),
    (
      ["--config.model.moe.router=top_k(k=2,jitter='x')"],
      "jitter='x' must be float",
    ),
    (["--config.model.moe.matmul=tpu"], "it is for tpu, not cpu"),
    (["--config.model.d_model=100000000"], "the training state needs"),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
  place, overrides, message, monkeypatch, capsys
):
  monkeypatch.chdir(place)
  assert main(["train", "--config=config.py", "--workdir=bad", *overrides]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1, error
  assert not (place / "bad").exists()


def test_assignments_that_go_nowhere_are_said_once(place, monkeypatch, capsys):
  (place / "leaky.py").write_text(
    "from moejax.routing import top_k\n"
    "def router(logits_TE, mask_T, *, rng=None):\n"
    "  good = top_k(logits_TE, mask_T, k=1)\n"
    "  nowhere = logits_TE.shape[1]\n"
    "  return good.replace(expert_A=good.expert_A.at[::4].set(nowhere))\n"
  )
  monkeypatch.chdir(place)
  code = main([
    "train", "--config=config.py", "--workdir=leaky",
    "--config.model.moe.router=leaky.router", "--config.train.num_steps=3",
    "--config.optimizer.schedule.warmup=1",
    "--config.optimizer.schedule.decay=0", "--config.eval.every=0",
  ])  # fmt: skip
  out = capsys.readouterr().out
  assert code == 0
  assert out.count("assignments went to no expert") == 1, out
  assert re.search(r"note: 2\d\.\d% of step 1's", out), out


def test_a_router_that_raises_is_one_line(place, monkeypatch, capsys):
  (place / "bug.py").write_text(
    "import jax\n"
    "def router(logits_TE, mask_T, *, k, rng=None):\n"
    "  return jax.lax.topk(logits_TE, k)\n"
  )
  monkeypatch.chdir(place)
  argv = ["train", "--config=config.py", "--workdir=bug"]
  argv.append("--config.model.moe.router=bug.router(k=2)")
  assert main(argv) == 2
  error = capsys.readouterr().err
  assert "router bug.router(k=2) (bug.py:3) raised AttributeError: " in error
  assert error.count("\n") == 1, error
  with pytest.raises(ConfigError) as caught:
    main([*argv, "--debug"])
  assert isinstance(caught.value.__cause__, AttributeError)


def test_a_loss_that_is_none_before_any_update(place, monkeypatch, capsys):
  """Then no learning rate is to blame."""
  (place / "nan.py").write_text(
    "from moejax.routing import top_k\n"
    "def router(logits_TE, mask_T, *, k):\n"
    "  good = top_k(logits_TE, mask_T, k=k)\n"
    "  zero = 0.0 if len(mask_T) > 100 else 1.0\n"
    "  return good.replace(weight_A=good.weight_A / zero)\n"
  )
  monkeypatch.chdir(place)
  argv = ["train", "--config=config.py", "--workdir=nan"]
  assert main([*argv, "--config.model.moe.router=nan.router(k=2)"]) == 2
  error = capsys.readouterr().err
  assert "10 steps in a row were skipped" in error
  assert "before any update: look at the router or the data" in error
  assert "look at the router or the data" in error
  assert "learning_rate" not in error


def test_a_step_beyond_the_memory_is_refused(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  argv = ["train", "--config=config.py", "--workdir=huge"]
  assert main([*argv, "--config.train.batch_size=10000000"]) == 2
  error = capsys.readouterr().err
  assert "a training step needs" in error
  assert "lower train.batch_size" in error
  assert not (place / "huge" / "config.json").exists()


def test_validation_beyond_the_memory_is_refused(place, monkeypatch, capsys):
  """At the start, and not when it is due."""
  monkeypatch.chdir(place)
  argv = ["train", "--config=config.py", "--workdir=wide"]
  assert main([*argv, "--config.eval.batch_size=10000000"]) == 2
  error = capsys.readouterr().err
  assert "evaluating 10000000 rows at a time needs" in error
  assert "lower eval.batch_size" in error
  assert not (place / "wide" / "config.json").exists()


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_validation_on_a_mesh_that_drops_rows_may_need_more(
  place, monkeypatch, factor
):
  """It drops none: what a step needs does not tell."""
  monkeypatch.chdir(place)
  config = parse_config("config.py", [
    "--config.parallel.expert=2", f"--config.parallel.receive_factor={factor}",
  ])  # fmt: skip
  mesh = make_mesh(config.parallel, jax.devices()[:2])
  model = build_on_mesh(config, mesh, dropless=True)
  shardings = state_shardings(config, model, mesh)
  phases = phases_of(config)
  arguments = (
    dict.fromkeys(phases, model), phases,
    abstract_state(config, model, shardings),
  )  # fmt: skip
  memory.check_evaluation_fits(*arguments)
  monkeypatch.setattr(memory, "device_memory", lambda device: 200_000)
  if not factor:
    memory.check_evaluation_fits(*arguments)
    return
  with pytest.raises(ConfigError, match="where each device has room for all"):
    memory.check_evaluation_fits(*arguments)
