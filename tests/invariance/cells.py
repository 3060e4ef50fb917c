# SPDX-License-Identifier: Apache-2.0
"""One way to compute a batch, and what all ways must agree on.

The model has both kinds of experts, attention heads and MLPs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax import losses
from moejax.config import Config
from moejax.models import build, init_variables
from moejax.parallel import build_on_mesh, make_mesh
from moejax.step import batch_sums
from tests.invariance.routers import ROUTERS, bias_of

B, T, V, E = 32, 32, 62, 8

MESHES = {
  "one": {},
  "dp2": {"data": 2},
  "fsdp4": {"fsdp": 4},
  "ep2": {"expert": 2},
  "ep4": {"expert": 4},
  "ep8": {"expert": 8},
  "dp2-ep4": {"data": 2, "expert": 4},
  "ep2-tp2": {"expert": 2, "tensor": 2},
  "fsdp2-ep2-tp2": {"fsdp": 2, "expert": 2, "tensor": 2},
  "sequence2": {"sequence": 2},
}
ANY = "tests.invariance.routers.any_of(k=2)"
# Has no fixed number of experts a token, and so no attention experts.
EXPERT_CHOICE = "expert_choice(k=2, group_size=16)"
# Its capacity is known when the program is traced, as buffers need it.
SWITCH = "switch(k=2, group_size=16)"
TERMS = (
  "loss/total", "loss/balance", "loss/router_z", "loss/sequence_balance",
  "loss/mutual_information", "loss/router_entropy",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
  """How a batch is computed; the defaults are the reference."""

  mesh: str = "one"
  accumulation: int = 1
  remat: str = "none"
  dispatch: str = "dense"
  exchange: str = "auto"
  router: str = ANY

  def config(self) -> Config:
    mixer = "attention" if self.router == EXPERT_CHOICE else "moa"
    return Config.from_dict({
      "model": {
        "vocab_size": V, "d_model": 32, "num_layers": 2, "head_dim": 8,
        "num_heads": 4, "num_kv_heads": 2, "qk_norm": "none",
        "pattern": (f"{mixer}/moe",), "init_std": 0.1,
        "dtype": "float32", "remat": self.remat,
        "moe": {
          "num_experts": E, "d_expert": 20, "router": self.router,
          "dispatch": self.dispatch, "num_shared_experts": 1,
        },
      },
      "loss": {
        "load_balance": 0.3, "router_z": 0.2, "z_loss": 0.01,
        "sequence_balance": 0.1, "mutual_information": 0.1,
        "router_entropy": 0.1,
      },
      "data": {"seq_len": T},
      "train": {"batch_size": B, "accumulation_steps": self.accumulation},
      "parallel": MESHES[self.mesh] | {"exchange": self.exchange},
    })  # fmt: skip


def batch() -> dict[str, jax.Array]:
  """Two documents a row, padding at the end of some."""
  rng = np.random.default_rng(0)
  first = rng.integers(5, T - 5, B)
  end = np.where(np.arange(B) % 4 == 1, T - 7, T)
  place = np.arange(T)[None]
  segments = 1 + (place >= first[:, None])
  segments = np.where(place < end[:, None], segments, 0)
  positions = np.where(segments == 2, place - first[:, None], place)
  rows = {
    "tokens": rng.integers(0, V, (B, T)),
    "targets": rng.integers(0, V, (B, T)),
    "segment_ids": segments,
    "positions": positions,
  }
  rows = {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}
  return rows | {"loss_mask": rows["segment_ids"] > 0}


@functools.cache
def variables(router: str):
  """Float32 variables, the same for all cells.

  Of a draw without near-ties: a choice that rounding flips is no error.
  """
  key = jax.random.key(1 if router == ANY else 4)
  return init_variables(build(Cell(router=router).config().model), key)


def choosing(given, name: str):
  """The same variables for the router of this name, with a bias of its own."""
  noise = lambda x: 0.1 * jax.random.normal(jax.random.key(2), x.shape)
  state = jax.tree.map(lambda x: bias_of(name, noise(x)), given["router_state"])
  return given | {"router_state": state}


def outcomes(cell: Cell):
  """By router: terms of the loss, the gradient of each alone, routers' sums."""
  compute, given = program(cell), variables(cell.router)
  if cell.router != ANY:
    return {cell.router: jax.device_get(compute(given, batch()))}
  return {
    name: jax.device_get(compute(choosing(given, name), batch()))
    for name in ROUTERS
  }


def program(cell: Cell):
  config = cell.config()
  devices = jax.devices()[: config.parallel.num_devices]
  model = build_on_mesh(config, make_mesh(config.parallel, devices))

  @jax.jit
  def compute(given, batch):
    def terms(params):
      sums, stats = batch_sums(
        config, model, given | {"params": params}, batch, jax.random.key(3)
      )
      _, terms = losses.total_loss(config.loss, sums, stats)
      return jnp.stack([terms[name] for name in TERMS]), stats

    values, pull, stats = jax.vjp(terms, given["params"], has_aux=True)
    # A loop, so that the backward pass is compiled once.
    grads = jax.lax.map(lambda one: pull(one)[0], jnp.eye(len(TERMS)))
    return values, grads, stats

  return compute


@functools.cache
def reference(router: str):
  """One device, each expert on each token, all at once."""
  return outcomes(Cell(router=router))


def norm(tree) -> float:
  squares = (np.square(np.float64(x)).sum() for x in jax.tree.leaves(tree))
  return float(np.sqrt(sum(squares)))


def error(got, want, scale: float) -> float:
  """The largest difference of any leaf, relative to that leaf's norm.

  A leaf that is next to nothing is measured by a thousandth of `scale`: a
  gradient that should be zero is what rounding makes of it.
  """
  errors = jax.tree.map(
    lambda a, b: norm(np.float64(a) - b) / max(norm(b), 1e-3 * scale),
    got, want,
  )  # fmt: skip
  return max(jax.tree.leaves(errors))


def errors(got, want) -> dict[str, float]:
  """Of each thing that must agree."""
  found = {
    "values": error(got[0], want[0], norm(want[0])),
    "sums": error(got[2], want[2], norm(want[2])),
  }
  of_term = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  scale = norm(of_term(want[1], 0))
  for i, name in enumerate(TERMS):
    found[f"gradient of {name}"] = error(
      of_term(got[1], i), of_term(want[1], i), scale
    )
  return found
