# SPDX-License-Identifier: Apache-2.0
"""`moejax convert`: published checkpoints to runs and back, and the proof;
and dense runs as mixtures of experts."""

import argparse
import dataclasses

from moejax import cli
from moejax.convert.check import check
from moejax.convert.from_hf import from_hf
from moejax.convert.load import FAMILIES
from moejax.convert.to_hf import SHARD_BYTES, to_hf
from moejax.convert.upcycle import Recipe, upcycle
from moejax.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
  """`moejax convert from-hf|to-hf|check SRC DST`, or `upcycle`."""
  args, extra = _parse(argv)
  if args.action == "upcycle":
    config = cli.parse_config(args.config, extra)
    if args.seed is not None:
      config = dataclasses.replace(config, seed=args.seed)
    recipe = Recipe(args.granularity, args.noise, args.noise_std)
    upcycle(args.source, config, args.output, recipe, args.step)
    return 0
  if args.action == "from-hf":
    from_hf(args.source, args.target, args.dtype, args.tokenizer)
    return 0
  if args.action == "to-hf":
    if args.shard_size <= 0:
      raise ConfigError(f"--shard-size={args.shard_size} must be positive")
    size = int(args.shard_size * 1e9)
    to_hf(
      args.source, args.target, args.family, args.dtype, args.step, size,
      ema=args.ema,
    )  # fmt: skip
    return 0
  findings = check(args.source, args.target, args.step)
  words = {True: "same", False: "DIFFERENT", None: "unknown"}
  for finding in findings:
    print(f"{finding.what:<10} {words[finding.same]:<10} {finding.text}")
  return 0 if all(finding.same is not False for finding in findings) else 1


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """The arguments, and for `upcycle` the overrides of its config."""
  parser = argparse.ArgumentParser(
    "moejax convert",
    description="Hugging Face checkpoints (config.json, safetensors, "
    "tokenizer.json) as runs that `generate`, `eval` and "
    "`train --config.train.init_from` take, and back; and dense runs as "
    "mixtures of experts. All go on where they were stopped.",
    epilog=f"Families: {', '.join(FAMILIES)}.",
  )
  actions = parser.add_subparsers(dest="action", required=True)
  into = actions.add_parser("from-hf", help="a hub's folder as a run's")
  into.add_argument("source", help="folder with config.json and safetensors")
  into.add_argument("target", help="folder of the run to make")
  into.add_argument(
    "--tokenizer", help="byte or a tokenizer.json, instead of the source's"
  )
  out = actions.add_parser("to-hf", help="a run's checkpoint as a hub's folder")
  out.add_argument("source", help="folder of a run")
  out.add_argument("target", help="new folder")
  out.add_argument(
    "--family", choices=FAMILIES, help="default: the one that fits"
  )
  out.add_argument(
    "--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB",
    help="size of one file (default %(default)s)",
  )  # fmt: skip
  out.add_argument(
    "--ema", action="store_true", help="the moving average of the weights"
  )
  for sub in (into, out):
    sub.add_argument(
      "--dtype", choices=_DTYPES, help="of the weights (default: theirs)"
    )
  same = actions.add_parser(
    "check", help="compare config, tokenizer, tensors and logits"
  )
  same.add_argument("source", help="a hub's folder, or a run's")
  same.add_argument("target", help="the other one")
  sparse = actions.add_parser("upcycle", help="a dense run as an MoE")
  _add_upcycle_arguments(sparse)
  for sub in (out, same, sparse):
    sub.add_argument("--step", type=int, help="checkpoint (default: newest)")
  args, extra = parser.parse_known_args(argv)
  if extra and args.action != "upcycle":
    parser.error(f"unrecognized arguments: {' '.join(extra)}")
  return args, extra


def _add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
  cli.add_config_arguments(parser)
  add = parser.add_argument
  add("source", help="folder of a run whose layers are all /mlp")
  add(
    "--output", required=True, metavar="DIR", help="folder of the run to make"
  )
  add(
    "--granularity", type=int, default=Recipe.granularity, metavar="G",
    help="slices of the MLP's hidden channels; an expert is one of them "
    "(default %(default)s)",
  )  # fmt: skip
  add(
    "--noise", type=float, default=Recipe.noise, metavar="SHARE",
    help="of each expert's entries, drawn anew (default none)",
  )  # fmt: skip
  add(
    "--noise-std", type=float, default=Recipe.noise_std, metavar="STD",
    help="of those entries (default %(default)s)",
  )  # fmt: skip
  add("--seed", type=int, help="of routers and noise (default: the config's)")
