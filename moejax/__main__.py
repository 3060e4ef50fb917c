# SPDX-License-Identifier: Apache-2.0
"""The `moejax` command: finds the command's module and hands it the rest."""

import importlib
import multiprocessing
import os
import sys
from typing import NoReturn

from moejax.cli import make_importable
from moejax.errors import StuckError, UserError

COMMANDS = {
  "train": ("moejax.train", "train a model from a config, or go on with a run"),
  "eval": ("moejax.evaluate", "loss of a checkpoint on held-out or other data"),
  "replay": ("moejax.replay", "one step of a run again, layer by layer"),
  "generate": ("moejax.generate", "let a checkpoint write text"),
  "describe": ("moejax.describe", "sizes, FLOPs and memory of a config"),
  "plan": (
    "moejax.plan.command",
    "what a step needs on a TPU pod, without one",
  ),
  "convert": (
    "moejax.convert.command",
    "Hugging Face checkpoints to runs and back; upcycling",
  ),
  "sweep": ("moejax.sweep.command", "run many configs, compare them on a page"),
  "report": ("moejax.report", "draw a run's curves and expert loads as a page"),
  "analyze": (
    "moejax.analysis",
    "what a checkpoint's routers do on texts, as a page",
  ),
  "scaling": (
    "moejax.scaling.command",
    "plan runs for a scaling law, fit it, size a model",
  ),
  "data": ("moejax.data.command", "prepare token stores, train a tokenizer"),
}
# Of these, the same command goes on where it was stopped.
RESUMING = ("train", "sweep", "convert")


def usage() -> str:
  rows = [f"  {name:<10} {doc}" for name, (_, doc) in COMMANDS.items()]
  return "\n".join(
    [
      "moejax: train and study mixture-of-experts language models",
      "",
      "usage: moejax <command> [options]",
      "",
      *rows,
      "",
      "moejax <command> --help tells its options. First run:",
      "  moejax data prepare --config=configs/tiny.py",
      "  moejax train --config=configs/tiny.py --workdir=runs/tiny",
      "Add --debug to see the traceback of an error.",
    ]
  )


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns its exit code (2: something to fix)."""
  argv = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in argv
  argv = [arg for arg in argv if arg != "--debug"]
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(usage())
    return 0 if argv else 2
  if argv[0] not in COMMANDS:
    known = ", ".join(COMMANDS)
    print(f"moejax: no command {argv[0]!r}; known: {known}", file=sys.stderr)
    return 2
  try:
    make_importable(os.getcwd())
    module = importlib.import_module(COMMANDS[argv[0]][0])
    status = module.main(argv[1:]) or 0
    sys.stdout.flush()
    return status
  except UserError as e:
    if debug:
      raise
    print(f"moejax {argv[0]}: {e}", file=sys.stderr)
    if isinstance(e, StuckError):
      _end_now()
    return 2
  except MemoryError:
    if debug:
      raise
    print(
      f"moejax {argv[0]}: no more memory on this host; what is saved is whole"
      + ", and the same command goes on from it" * (argv[0] in RESUMING),
      file=sys.stderr,
    )
    _end_now()
  except KeyboardInterrupt:
    if debug:
      raise
    print(f"moejax {argv[0]}: stopped", file=sys.stderr)
    return 130
  except BrokenPipeError:
    # The reader of a pipe (`| head`) has enough; nothing is left to say, also
    # not by Python's own flush at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _end_now() -> NoReturn:
  """Ends the process, and those that it started, which may hang."""
  for child in multiprocessing.active_children():
    child.kill()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(2)


if __name__ == "__main__":
  sys.exit(main())
