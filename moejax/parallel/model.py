# SPDX-License-Identifier: Apache-2.0
"""A config's model on a mesh."""

import dataclasses

from jax.sharding import Mesh

from moejax.config import Config
from moejax.errors import ConfigError
from moejax.models import Transformer, build
from moejax.parallel.expert_parallel import ExpertParallel
from moejax.parallel.placement import OnMesh


def build_on_mesh(
  config: Config,
  mesh: Mesh,
  platform: str | None = None,
  dropless: bool = False,
) -> Transformer:
  """The model that computes with all devices of a mesh.

  Its variables are those of `models.build`, which also makes them.

  Args:
    config: `model` and `parallel`.
    mesh: as `make_mesh` makes it.
    platform: of the devices; None takes that of the mesh.
    dropless: with room for all rows, whatever `parallel.receive_factor` says:
      for evaluation, whose losses are not to depend on the mesh.

  Raises:
    ConfigError: the dispatch and the exchange do not fit.
  """
  platform = platform or mesh.devices.flat[0].platform
  model = build(config.model, platform)
  if mesh.size == 1:
    return model
  backends, experts = model.backends, None
  if dropless:
    parallel = dataclasses.replace(config.parallel, receive_factor=0.0)
    config = dataclasses.replace(config, parallel=parallel)
  if config.parallel.expert > 1:
    experts = _expert_parallel(config, backends.dispatch, platform)
    backends = dataclasses.replace(backends, dispatch=experts)
  backends = dataclasses.replace(backends, placement=OnMesh(mesh, experts))
  return Transformer(config.model, backends)


def _expert_parallel(config: Config, inner, platform: str) -> ExpertParallel:
  parallel, moe = config.parallel, config.model.moe
  exchange = parallel.exchange
  if exchange == "auto":
    exchange = "all_to_all" if moe.dispatch == "ragged" else "all_gather"
  if exchange == "all_to_all" and moe.dispatch != "ragged":
    raise ConfigError(
      f"parallel.exchange=all_to_all moves rows of model.moe.dispatch=ragged; "
      f"with {moe.dispatch} use all_gather"
    )
  return ExpertParallel(
    inner=inner,
    size=parallel.expert,
    num_experts=moe.num_experts,
    exchange=exchange,
    receive_factor=parallel.receive_factor,
    native=platform in ("tpu", "gpu"),
  )
