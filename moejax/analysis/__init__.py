# SPDX-License-Identifier: Apache-2.0
"""What routers do, from any checkpoint: measures, pictures and a page.

  from moejax import analysis

  run = analysis.load("runs/tiny")  # or runs/tiny:500
  plan = analysis.Plan({"wiki": ["wiki.txt"], "code": ["src/*.py"]})
  found = analysis.survey(run, plan)
  domains = analysis.domain_specialisation(found)
  analysis.draw(domains)  # a matplotlib figure

`moejax analyze` does all of it at once.
"""

from moejax.analysis.checkpoints import Checkpoint, find, load
from moejax.analysis.command import analyze, main
from moejax.analysis.counts import choices
from moejax.analysis.measures import (
  co_activation,
  domain_specialisation,
  entropy,
  saturation,
  vocabulary_specialisation,
)
from moejax.analysis.measures import load as expert_load
from moejax.analysis.page import charts, draw
from moejax.analysis.similarities import similarity
from moejax.analysis.surveys import Plan, Survey, survey, survey_all
from moejax.analysis.vocabulary import token_table

__all__ = [
  "Checkpoint", "Plan", "Survey", "analyze", "charts", "choices",
  "co_activation", "domain_specialisation", "draw", "entropy", "expert_load",
  "find", "load", "main", "saturation", "similarity", "survey", "survey_all",
  "token_table", "vocabulary_specialisation",
]  # fmt: skip
