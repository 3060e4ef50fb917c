# SPDX-License-Identifier: Apache-2.0
"""`moejax plan --config=FILE --topology=v5p:4x4x4`."""

import argparse

import jax

from moejax import cli
from moejax.errors import UserError
from moejax.plan.cache import cached_plan
from moejax.plan.report import describe
from moejax.plan.search import search
from moejax.plan.topology import EXAMPLES, devices_of


def main(argv: list[str]) -> int:
  """Prints a plan, or searches for the best."""
  args, config = _parse(argv)
  jax.config.update("jax_platforms", "cpu")  # no chip is used
  if args.search:
    print("searching; config.parallel's sizes and model.remat are not used")
    ranked = search(config, args.topology, args.fresh)
    if not ranked:
      raise UserError(
        f"nothing fits {args.topology}; take more chips, or a smaller batch"
      )
    given, (config, found) = config, ranked[0]
    options = _options(config, given)
    print("\nthe fastest that fits:\n  " + " ".join(options) + "\n")
  else:
    devices_of(args.topology)
    print(f"compiling for {args.topology}, a minute or more...", flush=True)
    found = cached_plan(config, args.topology, args.fresh)
  print(describe(config, found, args.price))
  return 0


def _parse(argv: list[str]):
  parser = argparse.ArgumentParser(
    "moejax plan",
    description="Compile a config's training step for a pod of TPUs or GPUs, "
    "without one, and say what each chip needs and how fast a step can be. "
    "Takes a minute or more; the same question again is answered from a cache.",
  )
  cli.add_config_arguments(parser)
  parser.add_argument(
    "--topology", required=True, help=f"kind and shape, such as {EXAMPLES}"
  )
  parser.add_argument(
    "--search", action="store_true",
    help="try the meshes and remat policies that the pod allows, fastest first",
  )  # fmt: skip
  parser.add_argument(
    "--price", type=_price, metavar="DOLLARS",
    help="of a chip for an hour; adds what tokens cost",
  )  # fmt: skip
  parser.add_argument(
    "--fresh", action="store_true", help="compile again, whatever the cache has"
  )
  args, extra = parser.parse_known_args(argv)
  return args, cli.parse_config(args.config, extra)


def _price(text: str) -> float:
  price = float(text)
  if not 0 < price < 1e6:
    raise argparse.ArgumentTypeError(f"{text} is no price")
  return price


def _options(config, given) -> list[str]:
  """What to write on the command line, for what was given."""
  names = (*config.parallel.AXES, "overlap")
  sizes = {a: getattr(config.parallel, a) for a in names}
  changed = [a for a in names if sizes[a] != getattr(given.parallel, a)]
  shown = [a for a in config.parallel.AXES if sizes[a] > 1]
  options = [
    f"--config.parallel.{a}={sizes[a]}" for a in names if a in changed + shown
  ]
  return [*options, f"--config.model.remat={config.model.remat}"]
