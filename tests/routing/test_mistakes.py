# SPDX-License-Identifier: Apache-2.0
"""Mistakes in routers of one's own are one line that names the place."""

import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.errors import ConfigError
from moejax.models import Rows, build, count, init_variables
from moejax.routing import Routing, projects, resolve, top_k
from moejax.routing.probe import probe
from moejax.routing.stats import RouterStats
from moejax.spec import Spec
from tests.routing.test_probe import EXAMPLES, E, model_of

RNG = "in evaluation rng is None; in training it is one key a token, .T.: jax"


def misnamed(logits_TE, mask_T, *, k, rng=None):
  weight_TX, expert_TX = jax.lax.topk(logits_TE, k)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def by_a_helper(logits_TE, mask_T, *, k, rng=None):
  return _helper(logits_TE)


def _helper(logits_TE):
  raise ValueError("first\nsecond")


def last_two_swapped(logits_TE, mask_T, *, k, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(logits_TE, k)
  return Routing.from_token_choice(expert_TX, weight_TX, mask_T, logits_TE)


def transposed(logits_TE, mask_T, *, k, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(logits_TE, k)
  return Routing.from_token_choice(expert_TX.T, weight_TX.T, logits_TE, mask_T)


def mask_of_numbers(logits_TE, mask_T, *, k, rng=None):
  return top_k(logits_TE, mask_T.astype(jnp.float32), k=k)


def unused_of_tokens(logits_TE, mask_T, *, k, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(logits_TE, k)
  return Routing.from_token_choice(
    expert_TX, weight_TX, logits_TE, mask_T, unused_TX=~mask_T
  )


def noise_in_evaluation(logits_TE, mask_T, *, k, rng=None):
  draw = lambda key: jax.random.normal(key, logits_TE.shape[1:])
  noisy_TE = logits_TE + jax.vmap(draw)(rng)
  return top_k(noisy_TE, mask_T, k=k).replace(logits_TE=logits_TE)


def one_key_for_all(logits_TE, mask_T, *, k, rng=None):
  if rng is None:
    return top_k(logits_TE, mask_T, k=k)
  noisy_TE = logits_TE + jax.random.normal(rng, logits_TE.shape)
  return top_k(noisy_TE, mask_T, k=k).replace(logits_TE=logits_TE)


jitted = jax.jit(misnamed, static_argnames="k")


@pytest.mark.parametrize(
  "name, source, message",
  [
    ("misnamed", "jax.lax.topk", "AttributeError: module 'jax.lax' has no "),
    ("jitted", "jax.lax.topk", "AttributeError: module 'jax.lax' has no "),
    ("by_a_helper", "raise ValueError", "raised ValueError: first"),
    ("last_two_swapped", "mask_T, logits_TE)", r"mask float32 \(16, 8\), not "),
    ("transposed", "expert_TX.T, weight_TX.T", r"experts \(2, 16\), weights "),
    ("mask_of_numbers", "mask_T.astype", r"the mask float32 \(16,\), not .T,"),
    ("unused_of_tokens", None, r"unused_TX is bool \(16,\), not bool \(16"),
    ("noise_in_evaluation", "(draw)(rng)", f"raised ValueError: .*{RNG}"),
    ("one_key_for_all", "normal(rng, ", f"accepts a single key.*{RNG}"),
  ],
)  # fmt: skip
def test_what_a_router_raises_is_a_line_with_its_place(name, source, message):
  text = f"{__name__}.{name}(k=2)"
  with pytest.raises(ConfigError, match=message) as caught:
    init_variables(build(model_of(text)), jax.random.key(0))
  said = str(caught.value)
  assert "\n" not in said
  assert caught.value.__cause__ is not None  # --debug shows it
  place = re.match(re.escape(f"router {text} (") + r"(.*?):(\d+)\)", said)
  assert place[1].endswith("test_mistakes.py")
  if source:
    line = Path(__file__).read_text().splitlines()[int(place[2]) - 1]
    assert source in line


def lazy(logits_TE, mask_T, *, k, rng=None):
  if len(mask_T) > 100:
    raise ValueError("too long")
  return top_k(logits_TE, mask_T, k=k)


def test_a_router_that_raises_only_in_the_model():
  model = build(model_of(f"{__name__}.lazy(k=2)"))
  variables = init_variables(model, jax.random.key(0))
  tokens_BT = jnp.zeros((1, 101), jnp.int32)
  rows = Rows(tokens_BT + 1, jnp.arange(101)[None])
  where = rf"lazy\(k=2\) \(.*:{_line_of(lazy) + 2}\) raised ValueError: too"
  with pytest.raises(ConfigError, match=where):
    model.apply(variables, tokens_BT, rows)


def _line_of(function):
  return inspect.getsourcelines(function)[1]


def swapped(mask_T, logits_TE, *, k, rng=None):
  raise AssertionError


def no_mask(logits_TE, *, k, rng=None):
  raise AssertionError


def keys_second(logits_TE, rng, *, k):
  raise AssertionError


@pytest.mark.parametrize("router", [swapped, no_mask, keys_second])
def test_the_first_two_parameters(router):
  name = f"{__name__}.{router.__name__}"
  where = rf"{name} \(.*test_mistakes.py:{_line_of(router)}\): its first "
  with pytest.raises(ConfigError, match=where + "parameters must be logits_TE"):
    resolve(Spec.parse(f"{name}(k=2)"))


def without_keys(logits_TE, mask_T, *, k):
  return top_k(logits_TE, mask_T, k=k)


def with_any(logits_TE, mask_T, **options):
  assert "rng" in options
  return top_k(logits_TE, mask_T, **options)


@pytest.mark.parametrize("router", [without_keys, with_any])
def test_keys_only_where_there_is_a_place_for_them(router):
  text = f"{__name__}.{router.__name__}(k=2)"
  init_variables(build(model_of(text)), jax.random.key(0))


def plain(logits_TE, mask_T, *, k=1, temp=1.0, n=2, after=None, rng=None):
  return top_k(logits_TE, mask_T, k=k)


def quoted(logits_TE, mask_T, *, temp: "float", k=1):
  return top_k(logits_TE, mask_T, k=k)


@pytest.mark.parametrize(
  "text, message",
  [
    ("plain(temp='hot')", "temp='hot' must be float, as its default 1.0 is"),
    ("plain(n=2.5)", "n=2.5 must be int, as its default 2 is, not float"),
    ("plain(n=True)", "n=True must be int"),
    ("quoted(temp='hot')", "temp='hot' must be float, not str"),
  ],
)  # fmt: skip
def test_options_without_annotations(text, message):
  with pytest.raises(ConfigError, match=message):
    resolve(Spec.parse(f"{__name__}.{text}"))


@pytest.mark.parametrize("text", ["plain(temp=2, after='x')", "quoted(temp=1)"])
def test_options_that_are_fine(text):
  resolve(Spec.parse(f"{__name__}.{text}"))


def test_a_name_that_is_no_function():
  with pytest.raises(ConfigError, match="jax is a module, not a function"):
    resolve(Spec.parse(f"{__name__}.jax"))


def test_a_default_of_k_must_stand_in_the_name():
  """Parameters and FLOPs are counted by the config alone."""
  for name in ("two", "two_as_a_list"):
    asked = rf"write k=2 in its name: {__name__}.{name}\(k=2, sure=0.3\)"
    with pytest.raises(ConfigError, match=asked):
      count(model_of(f"{__name__}.{name}(sure=0.3)"))
  two_experts = count(model_of(f"{__name__}.two(k=2, sure=0.3)"))
  assert two_experts == count(model_of("top_k(k=2)"))


def two(logits_TE, mask_T, *, k=2, sure=0.5, rng=None):
  return top_k(logits_TE, mask_T, k=k)


def two_as_a_list(logits_TE, mask_T, *, k=2, sure=0.5, rng=None):
  return top_k(logits_TE, mask_T, k=k).replace(experts_per_token=0)


@pytest.mark.parametrize(
  "lines, message",
  [
    ("import jax\nimport flaxx", ":2 raised ModuleNotFoundError: No module"),
    ("x = 1\ndef r(logits_TE:\n  pass", ":2 raised SyntaxError: '.' was never"),
    ("import json\njson.loads('{')", ":2 raised JSONDecodeError: Expecting"),
    ("from moejax.routing import nothing", ":1 raised ImportError: cannot im"),
  ],
)  # fmt: skip
def test_a_file_that_cannot_be_imported(lines, message, tmp_path, monkeypatch):
  name = f"broken_{abs(hash(lines))}"
  (tmp_path / f"{name}.py").write_text(lines)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match=rf"{name}\.py{message}") as caught:
    resolve(Spec.parse(f"{name}.r(k=2)"))
  assert "\n" not in str(caught.value)


@projects(heat_TE=1)
def heated(logits_TE, mask_T, *, k, heat_TE, rng=None):
  assert heat_TE.shape == (logits_TE.shape[0], 1)
  return top_k(logits_TE * heat_TE, mask_T, k=k).replace(logits_TE=logits_TE)


@projects(heat_TE="n_heat")
def no_such_width(logits_TE, mask_T, *, k, heat_TE, rng=None):
  raise AssertionError


@projects(heat_TE=0)
def no_width(logits_TE, mask_T, *, k, heat_TE, rng=None):
  raise AssertionError


@projects(heat_TE=1)
def no_parameter(logits_TE, mask_T, *, k, rng=None):
  raise AssertionError


def test_a_number_as_the_width_of_further_logits():
  config = model_of(f"{__name__}.heated(k=2)")
  variables = init_variables(build(config), jax.random.key(0))
  sizes = sum(x.size for x in jax.tree.leaves(variables))
  assert sizes == count(config).num_params
  assert sizes == count(model_of("top_k(k=2)")).num_params + config.d_model


@pytest.mark.parametrize(
  "router, message",
  [
    (no_such_width, r"projects\(heat_TE='n_heat'\): no option n_heat; .*: k$"),
    (no_width, "heat_TE=0 must be a positive integer"),
    (no_parameter, "the router has no parameter heat_TE"),
  ],
)
def test_widths_that_cannot_be(router, message):
  with pytest.raises(ConfigError, match=message):
    count(model_of(f"{__name__}.{router.__name__}(k=2)"))


def off_by_one(logits_TE, mask_T, *, k, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(jax.nn.softmax(logits_TE), k)
  return Routing.from_token_choice(expert_TX + 1, weight_TX, logits_TE, mask_T)


def test_experts_that_are_never_chosen_are_noted_once(capsys):
  router = functools.partial(off_by_one, k=2)
  for _ in range(2):
    probe(router, E, "off_by_one")
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  where = (
    rf"note: router off_by_one \(.*test_mistakes.py:{_line_of(off_by_one)}"
  )
  assert re.match(rf"{where}\) never chose expert 0 on 128 made-up", said)


@pytest.mark.parametrize(
  "text, num_experts",
  [(text, E) for text in EXAMPLES.values()]
  + [
    ("hash_tokens(k=1)", 512), ("random_choice(k=1)", 512),
    ("null_experts(k=2, num_null=64)", 8), ("top_p(p=0.1, k=4)", 64),
    ("group_limited(k=2, num_groups=8, topk_groups=1)", 64),
  ],
)  # fmt: skip
def test_no_router_of_ours_is_noted(text, num_experts, capsys):
  # Another name, as it may have been tried before.
  probe(resolve(Spec.parse(text)), num_experts, f"{text} again")
  assert capsys.readouterr().err == ""


def test_places_left_empty_on_purpose_are_not_dropped():
  rng = np.random.default_rng(0)
  logits_TE = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
  weight_TX, expert_TX = jax.lax.top_k(jax.nn.softmax(logits_TE), 2)
  mask_T = jnp.arange(6) < 5
  unused_TX = jnp.zeros((6, 2), bool).at[:3, 1].set(True)
  routing = Routing.from_token_choice(
    expert_TX, weight_TX, logits_TE, mask_T, unused_TX
  )
  goes_TX = ~np.asarray(unused_TX) & (np.arange(6) < 5)[:, None]
  np.testing.assert_array_equal(
    routing.expert_A, np.where(goes_TX, expert_TX, 4).reshape(-1)
  )
  np.testing.assert_array_equal(
    routing.weight_A, np.where(goes_TX, weight_TX, 0).reshape(-1)
  )
  stats = RouterStats.of(routing, mask_T[None])
  assert stats.dropped_B[0] == 0
  assert stats.count_BE.sum() == 7


def test_the_routers_of_the_page(tmp_path, monkeypatch, capsys):
  page = Path(__file__).parents[2] / "docs" / "routers.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  head = "import jax\nfrom moejax.routing import Routing\n"
  (tmp_path / "of_the_page.py").write_text(head + "".join(blocks))
  monkeypatch.syspath_prepend(tmp_path)
  for name in re.findall(r"^def (\w+)", "".join(blocks), re.MULTILINE):
    text = f"of_the_page.{name}(k=2)"
    probe(resolve(Spec.parse(text)), E, text)
  assert len(blocks) >= 3
  assert capsys.readouterr().err == ""


def test_no_experts_at_all():
  with pytest.raises(ConfigError, match="use 1 <= k <= 8"):
    MoEConfig(num_experts=8, router="top_k(k=0)")
