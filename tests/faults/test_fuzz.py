# SPDX-License-Identifier: Apache-2.0
"""Thousands of inputs of each kind: taken, or refused in one line; no crash.

MOEJAX_WHOLE=1 tries ten thousand.
"""

import copy
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax import runs
from moejax.config import (
  Config,
  MoEConfig,
  default_config,
  describe_options,
  option_at,
  require_mesh_fits,
  schedule_stretches,
  set_option,
)
from moejax.convert.hub_files import check_tensors, open_tensors, source_digest
from moejax.data import load_tokenizer
from moejax.data.batches import as_batch, as_element
from moejax.data.manifest import MANIFEST
from moejax.data.store import TokenStore
from moejax.errors import ConfigError, DataError, UserError
from moejax.models import count
from moejax.routing import resolve
from tests.convert import families
from tests.convert.hub_folder import write

pytestmark = pytest.mark.slow

MANY = settings(
  max_examples=10_000 if "MOEJAX_WHOLE" in os.environ else 2_000,
  deadline=None, derandomize=True, database=None,
  suppress_health_check=list(HealthCheck),
)  # fmt: skip
OLMOE = next(f for f in families.FAMILIES if f.name == "olmoe")

SCALARS = st.one_of(
  st.none(), st.booleans(), st.integers(), st.integers(-4, 300),
  st.floats(), st.floats(0, 1), st.text(max_size=12),
)  # fmt: skip
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.text(max_size=8), inner, max_size=3),
  ),
  max_leaves=6,
)
PATHS = [line.partition("=")[0] for line in describe_options()]
WORDS = st.sampled_from([
  "attention/moe", "moa/moe", "mla/mlp", "shared_kv/moe", "float32", "wsd",
  "ntk(alpha=3)", "yarn()", "batch_share(x=1.0)", "fixed(factor=-1)", "(",
  "top_k(k=2)", "recycle(group_size=8)", "a=b", "w=1", "[", "reweight", "a.b",
])  # fmt: skip
PHASES = st.lists(
  st.dictionaries(
    st.sampled_from(["name", "steps", "tokens", "options", "x"]),
    st.one_of(
      VALUES, st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=2)
    ),
    max_size=4,
  ),
  max_size=3,
)
PLAUSIBLE = st.one_of(
  VALUES, WORDS, st.lists(WORDS, max_size=3), PHASES, st.integers(1, 64)
)


def near(path):
  """Values of an option's own type and about its size: many are taken."""
  default = option_at(path).default
  match default:
    case bool():
      values = [True, False]
    case int():
      values = [default, default + 1, 2 * default, default // 2, 1, 0]
    case float():
      values = [default, default / 2, 2 * default, 0.5, 0.0, 1.0]
    case str():
      values = [default, "", "switch(k=1)", "full", "dots", "plain", "muon"]
    case _:
      values = [default, ["mlp"], ["attention/mlp", "attention/moe"], [1.0]]
  return st.tuples(st.just(path), st.sampled_from(values))


NEAR = st.sampled_from(PATHS).flatmap(near)
CHANGE = st.tuples(st.sampled_from(PATHS), PLAUSIBLE)


def one_line(error):
  text = str(error)
  assert text and "\n" not in text, text


@MANY
@given(
  st.one_of(
    st.lists(NEAR, min_size=1, max_size=4),
    st.lists(CHANGE, min_size=1, max_size=3),
  ),
  st.one_of(st.none(), st.none(), st.tuples(st.text(max_size=9), VALUES)),
)
def test_configs(changes, stray):
  """What is taken is taken again from its JSON, and can be counted."""
  values = copy.deepcopy(BASE)
  for path, value in changes:
    *parents, name = path.split(".")
    section = values
    for parent in parents:
      section = section[parent]
    section[name] = value
  if stray is not None:
    values[stray[0]] = stray[1]
  try:
    config = Config.from_dict(values)
  except ConfigError as e:
    one_line(e)
  else:
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    counted(config)


def counted(config):
  """All that is computed of a config before there is a model."""
  try:
    count(config.model)
    schedule_stretches(config)
    require_mesh_fits(config, 0, config.train.num_steps)
  except ConfigError as e:
    one_line(e)


BASE = Config().to_dict()


@MANY
@given(
  st.sampled_from(PATHS),
  st.one_of(st.text(max_size=20), WORDS, PLAUSIBLE.map(repr),
            PLAUSIBLE.map(lambda value: json.dumps(value, default=repr))),
)  # fmt: skip
def test_options_of_the_command_line(path, text):
  try:
    set_option(default_config(), path, text)
  except ConfigError as e:
    one_line(e)


PIECES = st.sampled_from([
  "top_k", "switch", "sinkhorn", "nowhere", "os", "system", "builtins", "exec",
  "moejax.routing", "__globals__", "numpy", "save", "jax", "k", "score",
  ".", ".", "(", "(", ")", ")", "=", "=", ",", ",", " ", "**", "*", "[", "]",
  "{", "}", ":", "'", '"', "1", "2", "-1", "1e400", "0x", "None", "True",
  "lambda", "open", "\0", "\n", "#", "9" * 5000, "((" * 60, "e",
  "\ud800", "é",
])  # fmt: skip


# Well-formed ones too, of which some are routers.
CALLS = st.builds(
  lambda name, options: f"{name}({', '.join(options)})",
  st.sampled_from(["top_k", "switch", "top_p", "moejax.routing.sinkhorn",
                   "group_limited", "numpy.save", "os.system", "nowhere.f"]),
  st.lists(
    st.builds(
      lambda key, value: f"{key}={value!r}",
      st.sampled_from(["k", "p", "jitter", "score", "group_size", "x"]),
      st.one_of(st.integers(0, 4), st.sampled_from([0.5, "sigmoid", None, []])),
    ),
    max_size=2,
  ),
)  # fmt: skip


@MANY
@given(st.one_of(CALLS, st.lists(PIECES, max_size=9).map("".join), st.text()))
def test_router_strings(text):
  try:
    resolve(MoEConfig(router=text).router_spec)
  except ConfigError as e:
    one_line(e)


def damaged(data, rng):
  """Bytes with a few of them changed, cut or doubled."""
  data = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(data))) if data else 0
    match int(rng.integers(4)):
      case 0:
        data[at : at + 1] = bytes([int(rng.integers(256))])
      case 1:
        del data[at : at + int(rng.integers(1, 9))]
      case 2:
        data[at:at] = data[at : at + int(rng.integers(1, 9))]
      case 3:
        digits = b'0123456789-eE.[]{}",:'
        data[at : at + 1] = bytes([digits[int(rng.integers(len(digits)))]])
  return bytes(data)


RANDOM = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  folder = write(tmp_path_factory.mktemp("hub"), OLMOE)
  path = folder / "model.safetensors"
  data = path.read_bytes()
  size = 8 + int.from_bytes(data[:8], "little")
  return folder, path, data[:size], data[size:]


@MANY
@given(rng=RANDOM)
def test_safetensors_headers(hub, rng):
  folder, path, header, rest = hub
  text = damaged(header[8:], rng)
  size = len(text) if rng.integers(4) else int(rng.integers(2**63))
  path.write_bytes(size.to_bytes(8, "little") + text + rest)
  try:
    with open_tensors(folder) as tensors:
      check_tensors(OLMOE.rules(OLMOE.config), tensors)
      for name in tensors.names():
        tensors.read(name)
    source_digest(folder)
  except DataError as e:
    one_line(e)


@pytest.fixture(scope="module")
def store(place, tmp_path_factory):
  """A token store, its manifest and the bytes of its shard."""
  (folder,) = place.glob("token_store/text-*")
  copied = tmp_path_factory.mktemp("store") / folder.name
  shutil.copytree(folder, copied)
  (shard,) = copied.glob("*-train.array_record-*")
  return copied, (copied / MANIFEST).read_text(), shard, shard.read_bytes()


def read_or_refuse(folder):
  try:
    read_all(folder)
  except DataError as e:
    one_line(e)


def read_all(folder):
  opened = TokenStore.open(folder, load_tokenizer("byte"))
  for split in ("train", "validation"):
    for row in range(min(3, opened.rows(split))):
      as_batch(as_element(opened.read(split, row), 0, row)[None])


@MANY
@given(rng=RANDOM, value=VALUES)
def test_manifests_of_token_stores(store, rng, value):
  folder, text, shard, data = store
  shard.write_bytes(data)
  manifest = json.loads(text)
  if rng.integers(2):
    places = [manifest, manifest["splits"], manifest["splits"]["train"],
              manifest["splits"]["train"]["shards"],
              manifest["splits"]["train"]["shards"][0]]  # fmt: skip
    place = places[rng.integers(len(places))]
    keys = list(place) if isinstance(place, dict) else range(len(place))
    key = keys[int(rng.integers(len(keys)))]
    if rng.integers(3):
      place[key] = value
    else:
      del place[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
  else:
    (folder / MANIFEST).write_bytes(damaged(text.encode(), rng))
  read_or_refuse(folder)


@MANY
@given(rng=RANDOM)
def test_shards_of_token_stores(store, rng):
  """Whose digest says that they are whole, as whoever made them may."""
  folder, text, shard, data = store
  wrong = damaged(data, rng)
  shard.write_bytes(wrong)
  manifest = json.loads(text)
  (entry,) = manifest["splits"]["train"]["shards"]
  entry["bytes"] = len(wrong)
  entry["sha256"] = hashlib.sha256(wrong).hexdigest()
  (folder / MANIFEST).write_text(json.dumps(manifest))
  read_or_refuse(folder)


@MANY
@given(rng=RANDOM)
def test_configs_of_runs(unbroken, tmp_path_factory, rng):
  folder = tmp_path_factory.getbasetemp() / "fuzzed_run"
  folder.mkdir(exist_ok=True)
  data = (unbroken / "config.json").read_bytes()
  (folder / "config.json").write_bytes(damaged(data, rng))
  try:
    runs.read_config(folder)
  except UserError as e:
    one_line(e)
