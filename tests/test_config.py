# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from moejax import cli
from moejax.config import (
  Config,
  default_config,
  describe_options,
  differences,
  set_option,
)
from moejax.errors import ConfigError
from moejax.spec import Spec

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_sound_and_says_how_to_run_it(path):
  config = cli.parse_config(str(path), [])
  assert isinstance(config, Config)
  assert f"--config=configs/{path.name}" in path.read_text()


def test_defaults_survive_the_round_trip():
  config = Config.from_dict(default_config())
  assert config == Config()
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_option_is_documented_and_listed_once():
  lines = describe_options()
  assert all(len(line.split("  ", 1)[1]) > 8 for line in lines)
  names = [line.split("=")[0] for line in lines]
  assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize(
  "path,text,value",
  [
    ("model.num_layers", "4", 4),
    ("optimizer.learning_rate", "1e-3", 1e-3),
    ("optimizer.learning_rate", "1", 1.0),
    ("model.scan_layers", "false", False),
    ("data.sources", "a.txt,b/*.md", ("a.txt", "b/*.md")),
    ("data.weights", "(0.25, 1)", (0.25, 1.0)),
    ("data.weights", "", ()),
    # Brackets of a pattern are not those of the list.
    ("optimizer.no_decay", "[qk]_norm", ("[qk]_norm",)),
    ("optimizer.no_decay", "[qk]_norm,w_[ab]", ("[qk]_norm", "w_[ab]")),
    ("optimizer.no_decay", "['[qk]_norm', 'x']", ("[qk]_norm", "x")),
    ("model.moe.router", "top_k(k=2, score='sigmoid')",
     "top_k(k=2, score='sigmoid')"),
  ],
)  # fmt: skip
def test_values_from_the_command_line(path, text, value):
  config = default_config()
  set_option(config, path, text)
  for name in path.split("."):
    config = config[name]
  assert config == value
  assert type(config) is type(value)


@pytest.mark.parametrize(
  "path,text,message",
  [
    ("model.num_layer", "4", "did you mean 'model.num_layers'?"),
    ("num_layers", "4", "did you mean 'model.num_layers'?"),
    ("modle.num_layers", "4", "did you mean 'model'?"),
    ("train.seed", "4", "did you mean 'seed'?"),
    ("model.num_layers", "4.5", "model.num_layers='4.5' must be int"),
    ("model.num_layers", "true", "must be int"),
    ("model.scan_layers", "1", "must be true or false"),
    ("model.moe", "1", "model.moe is a section"),
    ("seed.x", "1", "seed is an option, not a section"),
  ],
)
def test_bad_values_from_the_command_line(path, text, message):
  with pytest.raises(ConfigError) as error:
    set_option(default_config(), path, text)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "values,message",
  [
    ({"model": {"num_layers": True}}, "must be int, not bool"),
    ({"model": {"num_layers": 2.0}}, "must be int, not float"),
    ({"model": {"num_layers": None}}, "must be int, not NoneType"),
    ({"model": 3}, "model is a section"),
    ({"data": {"sources": "a.txt"}}, "must be a tuple"),
    ({"data": {"sources": ()}}, "name one source"),
    ({"data": {"sources": ("a", "a")}}, "names a source twice"),
    ({"data": {"weights": (1.0, 2.0)}}, "2 entries for 1 data.sources"),
    ({"data": {"validation_fraction": 1.0}}, "not in [0, 1)"),
    ({"model": {"num_kv_heads": 5}}, "use num_kv_heads=4"),
    ({"model": {"head_dim": 7}}, "RoPE rotates pairs"),
    ({"model": {"pattern": ("attention/mo",)}}, "did you mean 'moe'?"),
    ({"model": {"prefix": ("attention/mlp",), "num_layers": 4,
                "pattern": ("attention/moe", "attention/mlp")}}, "use 3"),
    ({"model": {"moe": {"num_experts": 4}}}, "use 1 <= k <= 4"),
    ({"model": {"moe": {"router": "top_k(8)"}}}, "arguments as key=value"),
    ({"model": {"moe": {"router": "top_k(k=f())"}}}, "k must be a literal"),
    ({"model": {"moe": {"router": "top_k("}}}, "not of the form"),
    ({"model": {"moe": {"dispatch": "rugged"}}}, "did you mean 'ragged'?"),
    ({"train": {"batch_size": 6, "accumulation_steps": 4}}, "use 3"),
    ({"train": {"num_steps": 0}}, "train.num_steps=0 must be positive"),
    ({"optimizer": {"b2": 1.0}}, "optimizer.b2=1.0 is not in [0, 1)"),
    ({"optimizer": {"schedule": {"warmup": 1.5}}}, "neither whole steps"),
    ({"optimizer": {"schedule": {"decay_shape": "exponential", "final": 0.0}}},
     "out of reach"),
    ({"checkpoint": {"every": 10, "keep_every": 25}}, "not a multiple"),
    ({"seed": -1}, "seed=-1 is negative"),
    ({"train": {"batch_size": 10**8}}, "102400000000 tokens are beyond"),
    ({"seed": 10**23}, "is beyond 2147483647"),
    ({"train": {"num_steps": 3 * 10**9}}, "is beyond 2147483647"),
    ({"data": {"seq_len": 10**9}}, "data.seq_len=1000000000 is beyond"),
    ({"data": {"weights": (float("inf"),)}}, "must be a finite number"),
    ({"model": {"norm_eps": float("nan")}}, "must be a finite number"),
    ({"optimizer": {"schedule": {"warmup": float("inf")}}}, "must be a finite"),
    ({"optimizer": {"no_decay": ("a(b",)}}, "no regular expression"),
    ({"model": {"moe": {"matmul": "cpu_loop"}}}, "did you mean 'cpu_loops'?"),
  ],
  ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_impossible_configs_say_what_and_how(values, message):
  with pytest.raises(ConfigError) as error:
    Config.from_dict(values)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_default_config_is_locked():
  config = default_config()
  with pytest.raises(AttributeError, match="num_layers"):
    config.model.num_layer = 3


@pytest.mark.parametrize(
  "body,message",
  [
    (
      "c.model.num_layer = 3",
      "no option 'num_layer'; did you mean 'num_layers'",
    ),
    ("c.model.num_layers = 'x'", "num_layers"),
    ("raise ValueError('variants: a, b')", "variants: a, b"),
    ("1 / 0", "bad.py, line 4: ZeroDivisionError"),
    ("c.seed = unknown", "line 4: NameError: name 'unknown'"),
    ("from moejax.config import defalt", "line 4: ImportError"),
    ("return None", "get_config returned NoneType"),
  ],
)
def test_errors_in_a_config_file_are_one_line(tmp_path, body, message):
  path = tmp_path / "bad.py"
  path.write_text(
    "from moejax.config import default_config\n"
    f"def get_config():\n  c = default_config()\n  {body}\n  return c\n"
  )
  with pytest.raises(ConfigError) as error:
    cli.parse_config(str(path), [])
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_config_file_may_take_an_argument(tmp_path):
  path = tmp_path / "sized.py"
  path.write_text(
    "from moejax.config import default_config\n"
    "def get_config(arg='8'):\n  c = default_config()\n"
    "  c.model.num_layers = int(arg)\n  return c\n"
  )
  assert cli.parse_config(str(path), []).model.num_layers == 8
  assert cli.parse_config(f"{path}:12", []).model.num_layers == 12


def test_missing_and_broken_config_files(tmp_path):
  with pytest.raises(ConfigError, match="no config file 'nowhere.py'"):
    cli.parse_config("nowhere.py", [])
  broken = tmp_path / "broken.py"
  broken.write_text("def get_config(:\n")
  with pytest.raises(ConfigError, match="broken.py, line 1"):
    cli.parse_config(str(broken), [])
  text = tmp_path / "notes.txt"
  text.write_text("some words\n")
  with pytest.raises(ConfigError, match="notes.txt, line 1: invalid syntax"):
    cli.parse_config(str(text), [])
  typo = tmp_path / "typo.py"
  typo.write_text(
    "from moejax.config import default_config\n"
    "config = default_config()\nconfig.model.num_layer = 2\n"
  )
  with pytest.raises(ConfigError, match=r"line 3: no option 'num_layer'; did"):
    cli.parse_config(str(typo), [])
  empty = tmp_path / "empty.py"
  empty.write_text("")
  with pytest.raises(ConfigError, match="no function get_config"):
    cli.parse_config(str(empty), [])


def test_lists_and_tuples_do_not_differ_at_any_depth():
  phases = ({"name": "a", "options": {"data.weights": (1.0, 2.0)}},)
  old = {"train": {"phases": phases}}
  assert differences(old, json.loads(json.dumps(old))) == []


def test_differences_name_keys_and_both_values():
  old = Config().to_dict()
  new = json.loads(json.dumps(old))
  new["model"]["moe"]["num_experts"] = 8
  new["data"]["weights"] = [1.0]
  assert differences(old, new) == [
    "data.weights: [] -> [1.0]",
    "model.moe.num_experts: 64 -> 8",
  ]


def test_spec_parses_names_with_literals():
  spec = Spec.parse("a.b.c(k=2, names=('x', 'y'), f=-0.5)")
  assert spec.name == "a.b.c"
  assert spec.kwargs == {"k": 2, "names": ("x", "y"), "f": -0.5}
  assert Spec.parse("plain") == Spec("plain", {})
