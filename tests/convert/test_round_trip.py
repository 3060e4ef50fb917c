# SPDX-License-Identifier: Apache-2.0
"""Hub folder -> run -> hub folder: equal bytes, whatever happens between."""

import dataclasses
import json
import logging
import os
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import moejax.convert
from moejax import runs
from moejax.checkpoint import CheckpointReader, StepWriter
from moejax.cli import load_config_file
from moejax.config import Config
from moejax.convert.check import check
from moejax.convert.from_hf import from_hf
from moejax.convert.hub_export import architecture
from moejax.convert.hub_files import safetensors_header
from moejax.convert.to_hf import to_hf
from moejax.data.tokenizer import ByteTokenizer, load_tokenizer
from moejax.errors import CheckpointError, ConfigError, DataError, UserError
from moejax.generate import generate_tokens
from moejax.models import build, init_variables, stack_repeats
from moejax.sampling import Sampling
from tests.convert import families as hf
from tests.convert.hub_folder import write
from tests.fresh_run import fresh_run
from tests.test_published import CONFIGS, PUBLISHED

EACH = pytest.mark.parametrize("family", hf.FAMILIES, ids=lambda f: f.name)
OLMOE = hf.FAMILIES[0]


def weights(folder):
  return {
    name: array
    for path in sorted(folder.glob("*.safetensors"))
    for name, array in load_file(path).items()
  }


def assert_same_bytes(got, want):
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype, name
    assert got[name].tobytes() == array.tobytes(), name


@EACH
def test_there_generate_and_back(family, tmp_path):
  hub = write(tmp_path / "hub", family, shards=3, torch_dtype="float32")
  from_hf(hub, tmp_path / "run")
  run = runs.load_run(tmp_path / "run")
  tokens, _ = hf.inputs()
  got = generate_tokens(
    run.model, run.variables, tokens.tolist(), hf.NEW, Sampling(temperature=0),
    jax.random.key(0),
  )  # fmt: skip
  with np.load(family.file) as file:
    np.testing.assert_array_equal(got, file["greedy"])
  to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=30_000)
  assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
  assert_same_bytes(weights(tmp_path / "back"), hf.tensors(family))
  for name in ("config.json", "tokenizer.json"):
    one, two = ((tmp_path / x / name).read_text() for x in ("hub", "back"))
    assert json.loads(one) == json.loads(two)
  findings = {f.what: f for f in check(tmp_path / "back", tmp_path / "run")}
  assert findings["tensors"].same and findings["config"].same


def test_a_dtype_is_kept_unless_asked(tmp_path):
  half = {
    name: x.astype(ml_dtypes.bfloat16) for name, x in hf.tensors(OLMOE).items()
  }
  # Routers of some families are float32 among bfloat16 weights.
  router = "model.layers.0.mlp.gate.weight"
  half[router] = hf.tensors(OLMOE)[router]
  hub = write(tmp_path / "hub", OLMOE, half, torch_dtype="bfloat16")
  from_hf(hub, tmp_path / "run")
  to_hf(tmp_path / "run", tmp_path / "back")
  assert_same_bytes(weights(tmp_path / "back"), half)
  assert runs.load_run(tmp_path / "run").config.model.dtype == "bfloat16"
  from_hf(hub, tmp_path / "wide", dtype="float32")
  stored = runs.load_run(tmp_path / "wide").variables
  assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {"float32"}
  to_hf(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
  found = check(tmp_path / "narrow", tmp_path / "run")[2]
  assert found.same and "1 of another dtype" in found.text


# Two systems show what stacked layers need: a prefix, a pattern of two.
STACKED = ("deepseek_v3", "hunyuan_large")


@pytest.mark.parametrize(
  "name, scan_layers",
  [(name, False) for name in PUBLISHED] + [(name, True) for name in STACKED],
)
def test_a_trained_tiny_system_finds_its_family(name, scan_layers, tmp_path):
  values = load_config_file(f"{CONFIGS / name}.py:tiny")
  values.model.scan_layers = scan_layers
  run = fresh_run(tmp_path / "run", Config.from_dict(values))
  to_hf(run, tmp_path / "hub", dtype="bfloat16")
  from_hf(tmp_path / "hub", tmp_path / "again")
  assert check(tmp_path / "hub", run)[2].same
  assert check(tmp_path / "hub", tmp_path / "again")[2].same
  config = json.loads((tmp_path / "hub" / "config.json").read_text())
  kinds = {
    "olmoe_1b_7b": "olmoe", "jetmoe_8b": "jetmoe", "dbrx_132b": "dbrx",
    "hunyuan_large": "hunyuan", "mixtral_8x7b": "mixtral",
    "qwen3_30b_a3b": "qwen3_moe", "flex_olmo_7x7b": "flex_olmo",
    "deepseek_v3": "deepseek_v3",
  }  # fmt: skip
  assert config["model_type"] == kinds[name]
  assert config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 258


def test_a_model_of_no_family_says_what_would_be_lost(tmp_path):
  values = load_config_file(f"{CONFIGS / 'tiny.py'}")
  values.model.norm_position = "post"
  values.model.moe.num_shared_experts = 1
  values.model.num_layers = 1
  run = fresh_run(tmp_path / "run", Config.from_dict(values))
  with pytest.raises(ConfigError, match="flex_olmo comes nearest.*num_shared"):
    to_hf(run, tmp_path / "hub")
  assert not (tmp_path / "hub").exists()


def test_the_byte_tokenizer_goes_along(tmp_path):
  from tokenizers import Tokenizer

  from moejax.convert.hub_tokenizer import special_ids, write_tokenizer

  write_tokenizer(ByteTokenizer(), tmp_path)
  ids = json.loads((tmp_path / "generation_config.json").read_text())
  assert ids == special_ids(ByteTokenizer())
  words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  text = "".join(map(chr, range(300))) + " naïve 漢字 🙂\n\ttabs  </s>"
  text = text.replace("</s>", "")
  assert words.encode(text).ids == list(text.encode())
  assert words.decode(list(text.encode())) == text


def stop_after(monkeypatch, n):
  """The writer's process dies in the middle, as far as it can tell."""
  write_one, done = StepWriter.write, []

  def write(self, name, array):
    if len(done) == n:
      raise KeyboardInterrupt
    write_one(self, name, array)
    done.append(name)

  monkeypatch.setattr(StepWriter, "write", write)
  return done


def test_a_stopped_import_goes_on(tmp_path, monkeypatch, capsys):
  hub = write(tmp_path / "hub", OLMOE)
  with monkeypatch.context() as m:
    stop_after(m, 5)
    with pytest.raises(KeyboardInterrupt):
      from_hf(hub, tmp_path / "run")
  # Nothing takes it for a whole one.
  with pytest.raises(DataError, match="is not the folder of a run"):
    runs.load_run(tmp_path / "run")
  assert CheckpointReader(tmp_path / "run/checkpoints").latest() is None
  # Another source is not mixed in.
  other = write(tmp_path / "other", hf.FAMILIES[1])
  with pytest.raises(CheckpointError, match="holds unfinished work on"):
    from_hf(other, tmp_path / "run")
  with monkeypatch.context() as m:
    done = stop_after(m, 1000)
    from_hf(hub, tmp_path / "run")
  assert "going on: 5 of 27 are done" in capsys.readouterr().out
  assert len(done) == 22
  assert check(hub, tmp_path / "run")[2].same
  from_hf(hub, tmp_path / "run")
  assert "holds this checkpoint already" in capsys.readouterr().out
  with pytest.raises(ConfigError, match="holds another checkpoint"):
    from_hf(other, tmp_path / "run")


def test_a_leaf_that_changed_since_is_written_again(tmp_path, monkeypatch):
  hub = write(tmp_path / "hub", OLMOE)
  with monkeypatch.context() as m:
    stop_after(m, 5)
    with pytest.raises(KeyboardInterrupt):
      from_hf(hub, tmp_path / "run")
  arrays = tmp_path / "run/checkpoints/0/arrays/params"
  (chunk,) = (arrays / "w_embed_VD").glob("[0-9]*")
  chunk.write_bytes(chunk.read_bytes()[:-4])
  from_hf(hub, tmp_path / "run")
  assert check(hub, tmp_path / "run")[2].same


def test_a_stopped_export_goes_on(tmp_path, monkeypatch):
  from moejax.convert import hub_files

  hub = write(tmp_path / "hub", OLMOE)
  from_hf(hub, tmp_path / "run")
  write_one = hub_files.write_safetensors
  written = []

  def stop(path, *rest):
    if len(written) == 2:
      raise KeyboardInterrupt
    write_one(path, *rest)
    written.append(path.name)

  with monkeypatch.context() as m:
    m.setattr(hub_files, "write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
      to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=30_000)
  with pytest.raises(DataError, match="config.json is missing"):
    from_hf(tmp_path / "back", tmp_path / "again")
  with pytest.raises(DataError, match="holds an unfinished export"):
    to_hf(tmp_path / "run", tmp_path / "back", dtype="bfloat16")
  before = {name: (tmp_path / "back" / name).stat() for name in written}
  to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=30_000)
  for name, stat in before.items():
    assert (tmp_path / "back" / name).stat().st_mtime_ns == stat.st_mtime_ns
  assert_same_bytes(weights(tmp_path / "back"), hf.tensors(OLMOE))
  with pytest.raises(DataError, match="is not empty"):
    to_hf(tmp_path / "run", tmp_path / "back")


def test_a_stopped_export_of_memory_begins_anew(tmp_path, monkeypatch):
  """Other weights may be there by then."""
  module = sys.modules["moejax.convert.to_hf"]  # the name is its function's
  config, variables = moejax.convert.load_hf(write(tmp_path / "hub", OLMOE))
  zeros = jax.tree.map(np.zeros_like, variables)
  words = load_tokenizer(tmp_path / "hub")
  with monkeypatch.context() as m:
    m.setattr(module, "_write_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      moejax.convert.save_hf(tmp_path / "back", config, zeros, words)
  moejax.convert.save_hf(tmp_path / "back", config, variables, words)
  assert_same_bytes(weights(tmp_path / "back"), hf.tensors(OLMOE))


def test_the_tokenizer_that_was_trained_with_goes_back(tmp_path):
  """Not the one that was beside it, and with what else the hub says of it."""
  hub = write(tmp_path / "hub", OLMOE)
  said = {"eos_token_id": [1, 2], "temperature": 0.7}
  (hub / "generation_config.json").write_text(json.dumps(said))
  own = json.loads((hub / "tokenizer.json").read_text())
  own["normalizer"] = {"type": "Lowercase"}
  (tmp_path / "own.json").write_text(json.dumps(own))
  from_hf(hub, tmp_path / "run", tokenizer=tmp_path / "own.json")
  to_hf(tmp_path / "run", tmp_path / "back")
  want = load_tokenizer(tmp_path / "own.json").digest
  assert load_tokenizer(tmp_path / "back").digest == want
  file = tmp_path / "back/generation_config.json"
  assert json.loads(file.read_text()) == said
  # Unless the ids are others.
  ids = own["model"]["vocab"]
  ids["a"], ids["b"] = ids["b"], ids["a"]
  (tmp_path / "own.json").write_text(json.dumps(own))
  from_hf(hub, tmp_path / "swapped", tokenizer=tmp_path / "own.json")
  to_hf(tmp_path / "swapped", tmp_path / "other")
  said = json.loads((tmp_path / "other/generation_config.json").read_text())
  assert said == {"eos_token_id": load_tokenizer(tmp_path / "own.json").eos_id}


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "deepseek_v3"])
def test_a_model_without_shared_experts(name, tmp_path):
  family = next(f for f in hf.FAMILIES if f.name == name)
  moe = dataclasses.replace(family.config.moe, num_shared_experts=0)
  config = Config.from_dict(
    {"model": dataclasses.asdict(dataclasses.replace(family.config, moe=moe)),
     "data": {"tokenizer": "byte"}}
  )  # fmt: skip
  variables = init_variables(build(config.model), jax.random.key(0))
  moejax.convert.save_hf(
    tmp_path / "hub", config.model, variables, ByteTokenizer(), family=name
  )
  again, loaded = moejax.convert.load_hf(tmp_path / "hub")
  assert again.moe.num_shared_experts == 0
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def fill(folder, leaving):
  """Takes the rest of a disk; returns the file to delete."""
  free = os.statvfs(folder)
  ballast = folder / "ballast"
  ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - leaving))
  return ballast


def test_a_full_disk(small_disk, tmp_path, monkeypatch):
  big = hf.tensors(OLMOE)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    big[name] = np.tile(big[name], (100, 1))
  hub = write(tmp_path / "hub", OLMOE, big, vocab_size=100 * hf.V)
  ballast = fill(small_disk, 800_000)
  with pytest.raises(CheckpointError, match="needs 1.1 MB, its disk has"):
    from_hf(hub, small_disk / "run")
  # And where it fills up on the way.
  monkeypatch.setattr(StepWriter, "_require_room", lambda self: None)
  with pytest.raises(CheckpointError, match="No space left .*goes on with it"):
    from_hf(hub, small_disk / "run")
  assert not (small_disk / "run/config.json").exists()
  assert CheckpointReader(small_disk / "run/checkpoints").latest() is None
  ballast.unlink()
  from_hf(hub, small_disk / "run")
  assert check(hub, small_disk / "run")[2].same
  ballast = fill(small_disk, 800_000)
  with pytest.raises(UserError, match="No space left .*the same command"):
    to_hf(small_disk / "run", small_disk / "back")
  assert not (small_disk / "back/config.json").exists()
  ballast.unlink()
  to_hf(small_disk / "run", small_disk / "back")
  assert_same_bytes(weights(small_disk / "back"), big)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
  hub = write(tmp_path / "hub", OLMOE)
  with pytest.raises(DataError, match="has 259 tokens, its embedding 53 rows"):
    from_hf(hub, tmp_path / "run", tokenizer="byte")
  (hub / "tokenizer.json").unlink()
  (hub / "tokenizer.model").write_bytes(b"x")
  with pytest.raises(DataError, match="no tokenizer.json .but tokenizer.model"):
    from_hf(hub, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_difference_is_found(tmp_path):
  hub = write(tmp_path / "hub", OLMOE)
  from_hf(hub, tmp_path / "run")
  changed = hf.tensors(OLMOE)
  changed["model.norm.weight"][3] += 1e-3
  write(hub, OLMOE, changed)
  found = check(hub, tmp_path / "run")[-1]
  assert not found.same and "62 of 63 byte-equal" in found.text
  assert "model.norm.weight" in found.text
  found = check(write(hub, OLMOE, rope_theta=7.0), tmp_path / "run")[-1]
  assert found.what == "config" and "rope_theta: 10000.0 -> 7.0" in found.text
  with pytest.raises(DataError, match="2 of .* have a checkpoints/"):
    check(tmp_path / "run", tmp_path / "run")


def test_the_header_is_the_librarys(tmp_path):
  from safetensors import safe_open

  hub = write(tmp_path / "hub", OLMOE)
  from_hf(hub, tmp_path / "run")
  to_hf(tmp_path / "run", tmp_path / "back")
  with safe_open(tmp_path / "back/model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
  assert len(safetensors_header([])) % 8 == 0


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_in_memory(scan_layers, tmp_path):
  family = next(f for f in hf.FAMILIES if f.name == "qwen3_moe")
  hub = write(tmp_path / "hub", family)
  config, variables = moejax.convert.load_hf(hub)
  if scan_layers:
    config = dataclasses.replace(config, scan_layers=True)
    variables = stack_repeats(config, variables)
  words = load_tokenizer(hub)
  moejax.convert.save_hf(tmp_path / "back", config, variables, words)
  assert_same_bytes(weights(tmp_path / "back"), hf.tensors(family))
  again, _ = moejax.convert.load_hf(tmp_path / "back")
  assert architecture(again) == architecture(config)
  with pytest.raises(DataError, match="is not empty"):
    moejax.convert.save_hf(tmp_path / "back", config, variables, words)


@EACH
@pytest.mark.hf
def test_transformers_loads_an_export_without_a_word(
  family, tmp_path, caplog, recwarn
):
  transformers = pytest.importorskip("transformers", reason="needs [hf]")
  pytest.importorskip("torch", reason="needs [hf]")
  hub = write(tmp_path / "hub", family, torch_dtype="float32")
  from_hf(hub, tmp_path / "run")
  (tmp_path / "run/hub/config.json").unlink()  # ours has to do
  to_hf(tmp_path / "run", tmp_path / "back")
  logging.getLogger("transformers").propagate = True
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert type(model).__name__ == family.model_class
  assert not any(info.values()), info
  said = [r.getMessage() for r in caplog.records] + [
    str(w.message) for w in recwarn if "moejax" in str(w.filename)
  ]
  # transformers 5.23 warns of a key of its own Hunyuan code.
  assert [x for x in said if "'alpha'" not in x] == []
  findings = {f.what: f for f in check(tmp_path / "back", tmp_path / "run")}
  assert findings["logits"].same, findings["logits"].text
