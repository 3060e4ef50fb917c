# SPDX-License-Identifier: Apache-2.0
"""Reading a hub's config.json: what is used, what is refused, what is left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import ROPE_SCALINGS
from moejax.errors import DataError
from moejax.spec import Spec

_REQUIRED = object()
# Says nothing about the architecture: training, tokens, files, generation.
_IRRELEVANT = frozenset(
  "architectures model_type torch_dtype dtype transformers_version auto_map "
  "use_cache bos_token_id eos_token_id pad_token_id eod_token_id sep_token_id "
  "initializer_range max_position_embeddings max_seq_len name_or_path "
  "_name_or_path output_router_logits router_aux_loss_coef aux_loss_coef "
  "attention_dropout resid_pdrop emb_pdrop attn_pdrop moe_loss_weight "
  "hidden_dropout router_jitter_noise moe_jitter_eps return_dict "
  "output_hidden_states output_attentions chunk_size_feed_forward id2label "
  "label2id is_encoder_decoder problem_type pretraining_tp".split()
)


class HubConfig:
  """A config.json whose keys are ticked off as they are read."""

  def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
    self._values, self.where, self._read = values, where, set()

  def merged(self, other: "HubConfig") -> "HubConfig":
    """Both as one; of a key that both have, the other's."""
    return HubConfig({**self._values, **other._values}, self.where)

  def take(self, *names: str, default: Any = _REQUIRED) -> Any:
    """The value under the first of `names` that is there and not null.

    Raises:
      DataError: none is, and there is no default.
    """
    self._read.update(names)
    for name in names:
      if name in self._values and self._values[name] is not None:
        return self._values[name]
    if default is _REQUIRED:
      raise DataError(f"{self.where} has no {' or '.join(names)}")
    return default

  def size(
    self, *names: str, default: int | object = _REQUIRED, least: int = 1,
    most: int = 2**31 - 1,
  ) -> int:  # fmt: skip
    """A whole number of `least` to `most`.

    Raises:
      DataError: it is missing or something else.
    """
    value = self.take(*names, default=default)
    if type(value) is not int or not least <= value <= most:
      self._refuse(names, value, f"a whole number of {least} to {most}")
    return value

  def number(self, *names: str, default: float | object = _REQUIRED) -> float:
    """A finite number that is not negative.

    Raises:
      DataError: it is missing or something else.
    """
    value = self.take(*names, default=default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
      self._refuse(names, value, "a number, not negative")
    return float(value)

  def flag(self, *names: str, default: bool | object = _REQUIRED) -> bool:
    """True or false.

    Raises:
      DataError: it is missing or something else.
    """
    value = self.take(*names, default=default)
    if type(value) is not bool:
      self._refuse(names, value, "true or false")
    return value

  def ignore(self, *names: str) -> None:
    """These are known, and say nothing that is needed here."""
    self._read.update(names)

  def section(self, name: str) -> "HubConfig":
    """A nested mapping, empty if it is not there.

    Raises:
      DataError: it is something else.
    """
    value = self.take(name, default={})
    if not isinstance(value, Mapping):
      self._refuse((name,), value, "a mapping")
    return HubConfig(value, f"{self.where}: {name}")

  def _refuse(self, names: Sequence[str], value: Any, wanted: str) -> None:
    name = next((n for n in names if n in self._values), names[0])
    raise DataError(f"{self.where}: {name}={value!r} is not {wanted}")

  def expect(self, name: str, *allowed: Any) -> None:
    """Refuses any other value of `name` than absence, null, or `allowed`.

    Raises:
      DataError: naming the value that the architecture cannot express.
    """
    value = self.take(name, default=allowed[0])
    if value not in allowed:
      raise DataError(
        f"{self.where}: {name}={value!r} is not supported, only "
        f"{' or '.join(map(repr, allowed))}"
      )

  def unread(self) -> list[str]:
    """Keys that nobody read and that might matter, sorted."""
    return sorted(set(self._values) - self._read - _IRRELEVANT)


def rope(hub: HubConfig, default_theta: float = 10000.0) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling` from either of the hub's spellings.

  Raises:
    DataError: a kind of scaling that is not known here.
  """
  scaling = hub.section("rope_scaling").merged(hub.section("rope_parameters"))
  theta = hub.number("rope_theta", default=default_theta)
  theta = scaling.number("rope_theta", default=theta)
  return {"rope_theta": theta, "rope_scaling": _scaling(scaling)}


def _scaling(hub: HubConfig) -> str:
  kind = hub.take("rope_type", "type", default="default")
  if kind == "default":
    return "none"
  if kind == "linear":
    return f"linear(factor={hub.number('factor')})"
  if kind == "yarn":
    return _yarn(hub)
  # Hunyuan calls it dynamic; nothing in it is.
  if kind == "dynamic" and hub.number("alpha", default=0.0):
    return f"ntk(alpha={hub.number('alpha')})"
  raise DataError(
    f"{hub.where}: scaling {kind!r} is not supported; linear, yarn, and "
    "dynamic with alpha are"
  )


def _yarn(hub: HubConfig) -> str:
  """transformers' defaults and its rule for the two magnitudes."""
  numbers = {
    "factor": hub.number("factor"),
    "original": hub.number("original_max_position_embeddings"),
    "beta_fast": hub.number("beta_fast", default=32.0),
    "beta_slow": hub.number("beta_slow", default=1.0),
    "mscale": hub.number("mscale", default=0.0),
    "mscale_all_dim": hub.number("mscale_all_dim", default=0.0),
  }
  if other := hub.unread():
    raise DataError(f"{hub.where}: yarn with {', '.join(other)} is not known")
  if not (numbers["mscale"] and numbers["mscale_all_dim"]):
    numbers["mscale"] = 1.0
  order = ROPE_SCALINGS["yarn"]
  return str(Spec("yarn", {name: numbers[name] for name in order}))


def stack(kinds: Sequence[str]) -> dict[str, Any]:
  """`prefix` and `pattern` of a list of layers: as little as describes it."""
  L = len(kinds)
  size, prefix, pattern = min(
    (p + n, p, n)
    for n in range(1, L + 1)
    for p in range(L - n + 1)
    if (L - p) % n == 0
    and all(kinds[i] == kinds[p + (i - p) % n] for i in range(p, L))
  )
  del size
  return {
    "num_layers": L,
    "prefix": tuple(kinds[:prefix]),
    "pattern": tuple(kinds[prefix : prefix + pattern]),
  }


def refuse_constant_weights(k: int, renormalize: bool) -> None:
  """Raises DataError if the router's weights do not depend on it."""
  if renormalize and k == 1:
    raise DataError(
      "config.json: weights renormalised over one expert are always 1, which "
      "leaves the router without a gradient; not supported"
    )


def top_k(k: int, renormalize: bool) -> str:
  """The router of a config.

  Raises:
    DataError: renormalised at k = 1, where the weight is 1 whatever the router
      says and no gradient reaches it; `moejax.routing.top_k` refuses it too.
  """
  refuse_constant_weights(k, renormalize)
  more = ", renormalize=True" if renormalize else ""
  return f"top_k(k={k}{more})"
