# SPDX-License-Identifier: Apache-2.0
"""Whether a config fits on a pod, and how fast it can be there.

The TPU compiler needs no TPU: the extra [plan] brings it to any machine. It
compiles the real training step; its program is then walked through, loops and
all.

  topology    devices that are not here
  compiled    config -> step compiled for them -> Plan
  program     the compiled program's text, as instructions
  costs       arithmetic and traffic of one; kernels: of those nobody sees into
  chips       their rates; network: their links; gpu_targets: for the compiler
  collectives what goes over the links; clock: how long is waited for it
  roofline    the walk
  apart       a process of its own, for compilers that abort
  search      meshes and remat policies, by compiling each
"""

from moejax.plan.compiled import DoesNotFit, Memory, Plan, plan
from moejax.plan.report import describe
from moejax.plan.roofline import Roofline
from moejax.plan.search import search

__all__ = [
  "DoesNotFit",
  "Memory",
  "Plan",
  "Roofline",
  "describe",
  "plan",
  "search",
]
