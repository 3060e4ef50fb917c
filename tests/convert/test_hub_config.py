# SPDX-License-Identifier: Apache-2.0
"""A config.json with any value of the wrong kind is one line, no traceback."""

import copy
import json

import pytest

from moejax.convert.hub_config import HubConfig
from moejax.convert.load import FAMILIES, read_hub_config
from moejax.errors import DataError, UserError
from moejax.spec import Spec
from tests.convert import families as hf
from tests.convert.test_published_configs import HUB

WRONG = (
  None, True, -1, 0, 3, 1.5, 1e30, "", "x", [], [[1]], {}, {"a": 1}, 10**12,
)  # fmt: skip
CONFIGS = {f.name: f.hf_config for f in hf.FAMILIES} | {
  "hunyuan": HUB["hunyuan_large"]
}


def places(values, path=()):
  """Every key, nested ones too."""
  for key, value in values.items():
    yield (*path, key)
    if isinstance(value, dict):
      yield from places(value, (*path, key))


def changed(values, path, value):
  values = copy.deepcopy(values)
  inner = values
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return values


def test_every_family_is_here():
  assert {values["model_type"] for values in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_the_wrong_kind(name, tmp_path):
  lines = []
  for path in places(CONFIGS[name]):
    for value in WRONG:
      text = json.dumps(changed(CONFIGS[name], path, value))
      (tmp_path / "config.json").write_text(text)
      try:
        family, model = read_hub_config(tmp_path)
        if model.num_layers < 100:
          next(iter(family.rules(model)))
      except UserError as e:
        lines.append(str(e))
  assert len(lines) > 50
  assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("k, router", [(1, "top_k(k=1)"), (
  2, "top_k(k=2, renormalize=True)")])  # fmt: skip
def test_hunyuan_large_renormalises_what_is_more_than_one(k, router, tmp_path):
  """As its released code does; the published model has one."""
  values = CONFIGS["hunyuan"] | {"moe_topk": k}
  (tmp_path / "config.json").write_text(json.dumps(values))
  _, model = read_hub_config(tmp_path)
  assert Spec.parse(model.moe.router) == Spec.parse(router)


@pytest.mark.parametrize(
  "read, message",
  [
    (lambda h: h.size("n"), "c.json: n='4' is not a whole number of 1 to"),
    (lambda h: h.size("true"), "true=True is not a whole number"),
    (lambda h: h.size("new", "old"), "old=0 is not a whole number of 1"),
    (lambda h: h.size("big", most=9), "big=10 is not a whole number of 1 to 9"),
    (lambda h: h.number("minus"), "minus=-1.0 is not a number, not negative"),
    (lambda h: h.number("nan"), "nan=nan is not a number"),
    (lambda h: h.flag("old"), "old=0 is not true or false"),
    (lambda h: h.section("n"), "n='4' is not a mapping"),
    (lambda h: h.section("in").size("n"), "c.json: in: n=0.5 is not a whole"),
    (lambda h: h.size("none"), "c.json has no none"),
  ],
)
def test_typed_reads(read, message):
  values = {
    "n": "4", "true": True, "old": 0, "big": 10, "minus": -1.0,
    "nan": float("nan"), "in": {"n": 0.5}, "none": None,
  }  # fmt: skip
  with pytest.raises(DataError, match=message):
    read(HubConfig(values, "c.json"))


def test_what_is_there_is_returned():
  hub = HubConfig({"a": 2, "b": 3, "c": None, "d": True})
  assert hub.size("a") == 2
  assert hub.number("b") == 3.0
  assert hub.size("c", default=7) == 7
  assert hub.flag("d") is True
  assert hub.unread() == []
