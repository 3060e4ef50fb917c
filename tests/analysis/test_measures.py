# SPDX-License-Identifier: Apache-2.0
"""Each measure against a loop over tokens, and random routing at chance."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import analysis
from moejax.analysis import counts, measures, surveys, vocabulary
from moejax.analysis.surveys import Overlap, Survey
from moejax.config import ParallelConfig
from moejax.errors import ConfigError
from moejax.models import Rows
from moejax.models.transformer import boxed_variables
from moejax.parallel import build_on_mesh, make_mesh, shardings
from moejax.routing import Choices
from tests.analysis.small_model import E, K, make_run, make_texts


@dataclasses.dataclass
class Token:
  """One token at one router, found without any of the code that counts."""

  domain: str
  chosen: set[int]
  top: int
  entropy: float
  ids: tuple[int, int, int | None]  # itself, predicted, true next


@pytest.fixture(scope="module")
def run_and_plan(tmp_path_factory):
  folder = tmp_path_factory.mktemp("small")
  plan = analysis.Plan(make_texts(folder), batch_size=3)
  return analysis.load(make_run(folder / "run")), plan


@pytest.fixture(scope="module")
def found(run_and_plan):
  return analysis.survey(*run_and_plan)


@pytest.fixture(scope="module")
def tokens(run_and_plan):
  """Tokens of each router, [L] lists."""
  run, plan = run_and_plan
  routers: list[list[Token]] = [[] for _ in range(4)]
  forward = jax.jit(run.model.apply)
  for name, batch in plan.batches(run.tokenizer, run.config.data):
    rows = Rows(*map(jnp.asarray, (batch["segment_ids"], batch["positions"])))
    made = analysis.choices(run.model, run.variables, batch["tokens"], rows)
    made = jax.device_get(made)
    hidden = forward(run.variables, batch["tokens"], rows).hidden_BTD
    table = np.float64(run.variables["params"]["w_output_VD"])
    predicted = (np.float64(hidden) @ table.T).argmax(-1)
    for place in zip(*np.nonzero(batch["segment_ids"]), strict=True):
      following = int(batch["targets"][place])
      following = following if batch["loss_mask"][place] else None
      ids = int(batch["tokens"][place]), int(predicted[place]), following
      for router, seen in enumerate(routers):
        at = (router, *place)
        chosen = set(np.flatnonzero(made.chosen_BTE[at]).tolist())
        top, entropy = int(made.top_BT[at]), float(made.entropy_BT[at])
        seen.append(Token(name, chosen, top, entropy, ids))
  assert len(routers[0]) > 1000
  return routers


def each_router(tokens):
  return enumerate(tokens)


def test_there_are_as_many_tokens_and_routers(found, tokens):
  assert found.routers == (
    "layer 1 attention", "layer 1", "layer 2 attention", "layer 2"
  )  # fmt: skip
  for name, tally in found.domains.items():
    assert tally.tokens == sum(t.domain == name for t in tokens[0])


def test_co_activation(found, tokens):
  result = analysis.co_activation(found)
  for router, seen in each_router(tokens):
    for i in range(E):
      mine = [t.chosen for t in seen if i in t.chosen]
      assert result.count_LE[router, i] == len(mine)
      for j in range(E):
        have = result.share_LEE[router, i, j]
        if i == j or not mine:
          assert np.isnan(have)
        else:
          want = sum(j in chosen for chosen in mine) / len(mine)
          assert have == pytest.approx(want, rel=1e-12)
  np.testing.assert_allclose(result.chance_L, (K - 1) / (E - 1), rtol=1e-12)


def test_domain_specialisation(found, tokens):
  result = analysis.domain_specialisation(found)
  assert result.domains == ("code", "prose")
  np.testing.assert_allclose(result.chance_L, K / E, rtol=1e-12)
  for router, seen in each_router(tokens):
    for u, name in enumerate(result.domains):
      mine = [t for t in seen if t.domain == name]
      for i in range(E):
        share = sum(i in t.chosen for t in mine) / len(mine)
        top = sum(t.top == i for t in mine) / len(mine)
        at = u, router, i
        assert result.share_ULE[at] == pytest.approx(share, rel=1e-12)
        assert result.top_share_ULE[at] == pytest.approx(top, rel=1e-12)


def test_load_and_entropy(found, tokens):
  load, entropy = analysis.expert_load([found]), analysis.entropy([found])
  for router, seen in each_router(tokens):
    number = collections.Counter(e for t in seen for e in t.chosen)
    want = [number[i] / sum(number.values()) * E for i in range(E)]
    np.testing.assert_allclose(load.load_MLE[0, router], want, rtol=1e-12)
    mean = np.mean([t.entropy for t in seen])
    assert entropy.share_ML[0, router] == pytest.approx(mean, rel=1e-6)


def of_ids(seen, q):
  """Tokens by id of a kind, those that occur ten times."""
  groups = collections.defaultdict(list)
  for token in seen:
    if token.ids[q] is not None:
      groups[token.ids[q]].append(token)
  return {x: group for x, group in groups.items() if len(group) >= 10}


@pytest.mark.parametrize("q, kind", list(enumerate(counts.KINDS)))
def test_vocabulary_specialisation(found, tokens, q, kind):
  result = analysis.vocabulary_specialisation(found)
  assert result.kinds[q] == kind
  for router, seen in each_router(tokens):
    groups = of_ids(seen, q)
    assert result.ids_Q[q] == len(groups) > 1
    shares = [
      max(sum(i in t.chosen for t in group) for i in range(E)) / len(group)
      for group in groups.values()
    ]
    tops = [
      max(collections.Counter(t.top for t in group).values()) / len(group)
      for group in groups.values()
    ]
    share, top = result.share_QL[q, router], result.top_share_QL[q, router]
    assert share == pytest.approx(np.mean(shares), rel=1e-12)
    assert top == pytest.approx(np.mean(tops), rel=1e-12)


def visible(tokenizer, number):
  """What the tokenizer says that an id is, if it is a whole character."""
  own = tokenizer.decode([number])
  whole = own and "\ufffd" not in own
  shown = own.translate(str.maketrans(" \n\t\r", "␣⏎⇥⇤"))
  return shown if whole else f"#{number}"


def test_the_table_of_tokens(found, tokens, run_and_plan):
  run, _ = run_and_plan
  table = analysis.token_table(found, run.tokenizer, per_expert=3)
  rows = list(zip(*(table[key] for key in (
    "router", "kind", "expert", "id", "count", "top_share", "share", "text",
    "chance",
  )), strict=True))  # fmt: skip
  assert len(rows) > 50
  for row in rows:
    router, kind, expert, number, count, top_share, share, text, chance = row
    q = counts.KINDS.index(kind)
    group = of_ids(tokens[found.routers.index(router)], q)[number]
    assert count == len(group)
    assert top_share == pytest.approx(
      np.mean([t.top == expert for t in group]), rel=1e-12
    )
    assert share == pytest.approx(
      np.mean([expert in t.chosen for t in group]), rel=1e-12
    )
    assert top_share > 0
    every = tokens[found.routers.index(router)]
    load = np.mean([t.top == expert for t in every])
    assert chance == pytest.approx(max(1 / E, load), rel=1e-12)
    assert text == visible(run.tokenizer, number)
  for number, text in ((32, "␣"), (10, "⏎"), (97, "a"), (200, "#200")):
    assert vocabulary.spell(run.tokenizer, number) == text
  # Of each expert the most specialised, in order, and none above left out.
  seen = [t for t in tokens[3] if t.ids[0] is not None]
  for expert in range(E):
    best = sorted(
      (np.mean([t.top == expert for t in g]) for g in of_ids(seen, 0).values()),
      reverse=True,
    )  # fmt: skip
    best = [share for share in best[:3] if share > 0]
    have = [r[5] for r in rows if r[:3] == ("layer 2", "input", expert)]
    np.testing.assert_allclose(have, best, rtol=1e-12)


def test_batches_do_not_matter(run_and_plan, found):
  run, plan = run_and_plan
  other = analysis.survey(run, dataclasses.replace(plan, batch_size=7))
  for name, tally in found.domains.items():
    entropy_L = other.domains[name].entropy_L
    np.testing.assert_allclose(tally.entropy_L, entropy_L, rtol=1e-6)
    for key in ("tokens", "chosen_LE", "top_LE", "together_LEE"):
      have = getattr(other.domains[name], key)
      np.testing.assert_array_equal(getattr(tally, key), have)
  jax.tree.map(np.testing.assert_array_equal, found.words, other.words)


@pytest.mark.parametrize(
  "mesh", [{"data": 2, "expert": 2}, {"fsdp": 2, "tensor": 2}]
)
def test_a_mesh_counts_as_one_device_does(run_and_plan, found, mesh):
  run, plan = run_and_plan
  config = dataclasses.replace(run.config, parallel=ParallelConfig(**mesh))
  devices = make_mesh(config.parallel, jax.devices()[:4])
  where = shardings(devices, boxed_variables(run.model))
  split = dataclasses.replace(
    run,
    model=build_on_mesh(config, devices),
    variables=jax.device_put(run.variables, where),
  )
  other = analysis.survey(split, dataclasses.replace(plan, batch_size=4))
  for name, tally in found.domains.items():
    have = other.domains[name]
    np.testing.assert_array_equal(tally.together_LEE, have.together_LEE)
    np.testing.assert_array_equal(tally.top_LE, have.top_LE)
    np.testing.assert_allclose(tally.entropy_L, have.entropy_L, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, found.words, other.words)


def random_choices(seed, L, N, number, taste_E=0.0):
  """Of experts drawn independently for each token; evenly without a taste."""
  rng = np.random.default_rng(seed)
  order = (rng.gumbel(size=(L, 1, N, E)) + taste_E).argsort(-1)[..., ::-1]
  chosen = np.zeros((L, 1, N, E), bool)
  np.put_along_axis(chosen, order[..., :number], True, axis=-1)
  return Choices(
    jnp.asarray(chosen), jnp.asarray(order[..., 0], jnp.int32),
    jnp.zeros((L, 1, N)),
  )  # fmt: skip


def overlap_of(made, last):
  sums = surveys.overlap_sums(made, *surveys.pack(last))
  return Overlap(*np.asarray(sums))


def survey_of(made, ids=None, overlap=None):
  L, _, N, _ = made.chosen_BTE.shape
  tally = counts.Tally.of(made, jnp.ones((1, N), bool))
  words = None
  if ids is not None:
    words = counts.Words.empty(2000, L, E)
    three = jnp.stack([jnp.asarray(ids)] * 3)
    words = jax.device_get(words.add(made, three, three >= 0))
  domains = {"any": counts.on_host(tally, np.zeros(L))}
  names = tuple(f"layer {i}" for i in range(L))
  return Survey(0, names, E, domains, words, overlap)


def saturation_of(made, last):
  earlier = survey_of(made, overlap=overlap_of(made, last))
  return analysis.saturation([earlier, survey_of(last)])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_random_routing_is_at_chance(number):
  """Within five standard errors of 20,000 tokens, 2,000 ids of ten each."""
  N = 20_000
  ids = np.random.default_rng(1).permutation(N) % 2000
  made = random_choices(0, 2, N, number)
  other = random_choices(7, 2, N, number)
  last = survey_of(other, ids)
  chance = number / E
  error = 5 * np.sqrt(chance * (1 - chance) / (N / E)) + 1e-9
  earlier = survey_of(made, overlap=overlap_of(made, other))
  result = analysis.saturation([earlier, last])
  # Loads of so many tokens are even to a few in a thousand, in both.
  np.testing.assert_allclose(result.chance_ML, chance, rtol=1e-3)
  assert np.abs(result.share_ML[0] - chance).max() < error
  assert np.abs(result.top_share_ML[0] - 1 / E).max() < error
  domains = analysis.domain_specialisation(last)
  assert np.abs(domains.share_ULE - chance).max() < error
  pairs = analysis.co_activation(last)
  independent = (number - 1) / (E - 1)
  np.testing.assert_allclose(pairs.chance_L, independent, atol=1e-12)
  assert np.nanmax(np.abs(pairs.share_LEE - independent)) < error
  assert np.abs(analysis.expert_load([last]).load_MLE - 1).max() < error * E
  words = analysis.vocabulary_specialisation(last)
  for have, want, counts_QVLE in (
    (words.top_share_QL, words.top_chance_QL, last.words.top_QVLE),
    (words.share_QL, words.chance_QL, last.words.chosen_QVLE),
  ):
    deviation = (counts_QVLE[0].max(-1) / 10).std()
    # Of the ids' mean, and of the drawn chance's (`test_chance.py`).
    error = deviation * np.sqrt(1 / 2000 + 1 / 2**12 + 10 / 2**14)
    assert np.abs(have.mean(1) - want.mean(1)).max() < 5 * error / np.sqrt(2)


@pytest.mark.parametrize("mine, theirs", [(4, 1), (1, 4)])
def test_chance_of_saturation_is_that_of_the_earlier_ones_k(mine, theirs):
  """Of the last one's experts, a blind router with four of six has 4/6."""
  N = 20_000
  made, other = random_choices(0, 2, N, mine), random_choices(7, 2, N, theirs)
  result = saturation_of(made, other)
  chance_ML = np.array([[mine / E] * 2, [theirs / E] * 2])
  np.testing.assert_allclose(result.chance_ML, chance_ML, rtol=1e-3)
  error = 5 * np.sqrt(mine / E * (1 - mine / E) / N)
  assert np.abs(result.share_ML[0] - result.chance_ML[0]).max() < error
  np.testing.assert_allclose(result.top_chance_ML, 1 / E, rtol=1e-3)


def test_chance_of_saturation_has_the_loads_of_both():
  """Routers that know nothing of each other may prefer the same experts."""
  N, taste_E = 20_000, np.linspace(0, 3, E)
  made, other = (random_choices(seed, 2, N, 2, taste_E) for seed in (0, 7))
  result = saturation_of(made, other)
  for share_ML, chance_ML, even in (
    (result.share_ML, result.chance_ML, 2 / E),
    (result.top_share_ML, result.top_chance_ML, 1 / E),
  ):
    assert chance_ML.min() > 1.3 * even
    assert np.abs(share_ML[0] - chance_ML[0]).max() < 5 * np.sqrt(0.25 / N)


def test_chance_of_a_best_expert_leaves_out_tokens_that_have_none():
  """Half of the earlier one's tokens chose null experts alone."""
  N = 20_000
  made, other = random_choices(0, 2, N, 1), random_choices(7, 2, N, 1)
  some = (jnp.arange(N) % 2 == 0)[None, None]
  made = made.replace(
    chosen_BTE=made.chosen_BTE & some[..., None],
    top_BT=jnp.where(some, made.top_BT, E),
  )
  result = saturation_of(made, other)
  for share_ML, chance_ML in (
    (result.share_ML, result.chance_ML),
    (result.top_share_ML, result.top_chance_ML),
  ):
    np.testing.assert_allclose(chance_ML[0], 0.5 / E, rtol=1e-3)
    error = 5 * np.sqrt(0.5 / E / N)
    assert np.abs(share_ML[0] - chance_ML[0]).max() < error


def test_saturation_is_a_share_of_what_the_last_one_chose():
  """A token whose choice is the same, one half of it, one none of it."""

  def of(experts):
    chosen = np.zeros((1, 1, len(experts), E), bool)
    for place, pair in enumerate(experts):
      chosen[0, 0, place, list(pair)] = True
    top = np.array([[[pair[0] for pair in experts]]], np.int32)
    return Choices(jnp.asarray(chosen), jnp.asarray(top), jnp.zeros(top.shape))

  last = of([(0, 1), (0, 1), (0, 1), (2, 5)])
  made = of([(1, 0), (0, 4), (3, 4), (2, 5)])
  result = analysis.saturation([
    survey_of(made, overlap=overlap_of(made, last)), survey_of(last)
  ])  # fmt: skip
  np.testing.assert_allclose(result.share_ML, [[(2 + 1 + 0 + 2) / 8], [1.0]])
  np.testing.assert_allclose(result.top_share_ML, [[2 / 4], [1.0]])


def test_saturation_needs_two_and_vocabulary_needs_words(found):
  with pytest.raises(ConfigError, match="there is one; name several, or RUN:a"):
    analysis.saturation([found])
  with pytest.raises(ConfigError, match="no token id occurs 999999 times"):
    analysis.vocabulary_specialisation(found, 999_999)


def test_tallies_add_up(found):
  code, prose = found.domains["code"], found.domains["prose"]
  total = found.total
  assert total.tokens == code.tokens + prose.tokens
  np.testing.assert_array_equal(
    total.together_LEE, code.together_LEE + prose.together_LEE
  )
  assert total.together_LEE.dtype == np.int64
  assert measures.load([found]).load_MLE.sum() == pytest.approx(4 * E)


def test_the_closest_pair_is_neither_a_busy_expert_nor_a_rare_one():
  """Against a loop; expert 3 is in all company, expert 4 has one token."""
  rng = np.random.default_rng(0)
  E, count_E = 5, np.array([100, 120, 90, 300, 1])
  share_EE = rng.uniform(0.05, 0.1, (E, E))
  share_EE[:, 3] = 0.95
  share_EE[0, 1] = 0.6
  share_EE[4, 2] = 1.0
  np.fill_diagonal(share_EE, np.nan)
  pair = measures.strongest_pair(share_EE, count_E)
  assert (pair.i, pair.j, pair.share) == (0, 1, 0.6)
  rest = [2, 3, 4]
  shared = sum(share_EE[i, 1] * count_E[i] for i in rest)
  assert pair.others == pytest.approx(shared / count_E[rest].sum())
