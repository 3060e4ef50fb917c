# SPDX-License-Identifier: Apache-2.0
"""What a plan that was made before is of."""

import dataclasses

import pytest

from moejax.config import Config
from moejax.plan import cache
from moejax.plan.compiled import DoesNotFit

ROUTER = """
from moejax.routing import top_k


def mine(logits_TE, mask_T, *, k):
  return top_k(logits_TE, mask_T, k=k)
"""


@pytest.fixture
def compiles(monkeypatch, tmp_path):
  """How often a compiler was asked; it has no room for anything."""
  asked = []

  def refuse(plan, config, topology):
    asked.append(topology)
    raise DoesNotFit(f"no room, said {len(asked)} times")

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(cache, "run_apart", refuse)
  monkeypatch.setattr(cache, "compiler_of", lambda topology: "one")
  return asked


def refused(config, topology="v5e:2x2"):
  with pytest.raises(DoesNotFit) as e:
    cache.cached_plan(config, topology)
  return str(e.value)


def test_the_same_is_asked_once(compiles):
  assert refused(Config()) == refused(Config())
  assert len(compiles) == 1


@pytest.mark.parametrize("what", ["config", "topology", "flags", "compiler"])
def test_another_is_asked_anew(compiles, monkeypatch, what):
  config, topology = Config(), "v5e:2x2"
  refused(config, topology)
  match what:
    case "config":
      config = dataclasses.replace(config, seed=5)
    case "topology":
      topology = "v5e:4x4"
    case "flags":
      monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of_mine")
    case "compiler":
      monkeypatch.setattr(cache, "compiler_of", lambda topology: "another")
  refused(config, topology)
  assert len(compiles) == 2


def test_a_router_of_ones_own_that_changed_is_planned_anew(
  compiles, monkeypatch, tmp_path
):
  """Its text is none of the package's."""
  (tmp_path / "planned_router.py").write_text(ROUTER)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  model = Config().model
  moe = dataclasses.replace(model.moe, router="planned_router.mine(k=2)")
  config = dataclasses.replace(
    Config(), model=dataclasses.replace(model, moe=moe)
  )
  refused(config)
  refused(config)
  assert len(compiles) == 1
  (tmp_path / "planned_router.py").write_text(ROUTER + "\n# changed\n")
  refused(config)
  assert len(compiles) == 2
