# SPDX-License-Identifier: Apache-2.0
"""A run that starts from another run's weights, trained or converted."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax import runs
from moejax.checkpoint.leaves import describe
from moejax.config import Config, differences
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError
from moejax.models import Variables, build, stack_repeats, unstack_repeats

# Options of `model` that do not change what the weights mean.
_FREE = (
  "model.dtype", "model.attention", "model.remat", "model.scan_layers",
  "model.init_std", "model.init_cut", "model.moe.dispatch", "model.moe.matmul",
)  # fmt: skip


def weights_of(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
  """The weights in the folder `train.init_from`, as fields of a TrainState.

  They come in float32 and with layers stacked or apart, as this config has
  them. What is said of the same weights otherwise (RoPE, router, tokenizer) is
  noted.

  Raises:
    ConfigError: a weight of another name or shape.
    UserError: no run there, or none that is intact.
  """
  source = runs.load_run(config.train.init_from)
  variables = _laid_out(source.variables, source.config, config)
  wanted = describe(runs.abstract_variables(build(config.model)))
  found = describe(variables)
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found or name not in wanted:
      here = "here" if name in wanted else "there"
      raise ConfigError(f"{_where(config)}: {name} is only {here}")
    if wanted[name].shape != found[name].shape:
      raise ConfigError(
        f"{_where(config)}: {name} is {found[name]}, not {wanted[name]}"
      )
  changed = changed_meaning(source.config, config)
  if source.tokenizer.digest != tokenizer.digest:
    changed.append("the tokenizer")
  print(f"weights of {config.train.init_from}, step {source.step}")
  if changed:
    print(f"note: changed since: {'; '.join(changed)}")
  return variables


def changed_meaning(theirs: Config, ours: Config) -> list[str]:
  """`option: theirs -> ours` where it changes what weights mean."""
  changed = differences(
    theirs.to_dict()["model"], ours.to_dict()["model"], "model."
  )
  return [line for line in changed if not line.startswith(_FREE)]


def _laid_out(variables: Variables, theirs: Config, ours: Config) -> Variables:
  """In float32, with layers as ours are."""
  variables = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
  if theirs.model.scan_layers == ours.model.scan_layers:
    return variables
  change = stack_repeats if ours.model.scan_layers else unstack_repeats
  return change(theirs.model, variables)


def _where(config: Config) -> str:
  return f"train.init_from={config.train.init_from}"
