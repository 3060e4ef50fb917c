# SPDX-License-Identifier: Apache-2.0
"""The only place that knows devices: the mesh, what lies where, collectives.

Models name what their axes are (`moejax.models.placement`); here those names
meet the axes of a mesh.
"""

from moejax.parallel.batches import on_one_device
from moejax.parallel.copies import differing_copies
from moejax.parallel.mesh import make_mesh
from moejax.parallel.model import build_on_mesh
from moejax.parallel.overlap import compile_overlapped
from moejax.parallel.rules import shardings

__all__ = [
  "build_on_mesh",
  "compile_overlapped",
  "differing_copies",
  "make_mesh",
  "on_one_device",
  "shardings",
]
