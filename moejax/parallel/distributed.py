# SPDX-License-Identifier: Apache-2.0
"""Many processes as one run: how they find, and how they lose, each other.

JAX finds the others by itself on Cloud TPU, Slurm, GKE and Open MPI. Each
process then leaves a sign of life in the run's folder and watches those of the
others, so that the end of one ends all, with a message that names it.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

from moejax import storage
from moejax.checkpoint import processes
from moejax.errors import UserError
from moejax.files import cache_folder
from moejax.parallel.peers import Peers

_SILENT = 2.0  # seconds of waiting before it is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Options of a command that runs in many processes."""
  group = parser.add_argument_group(
    "many processes", "the same command in each; see docs/pods.md"
  )
  add = group.add_argument
  add(
    "--distributed", action="store_true",
    help="join the others, as Cloud TPU, Slurm, GKE or Open MPI name them",
  )  # fmt: skip
  add("--coordinator", metavar="HOST:PORT", help="of process 0, if none does")
  add("--num-processes", type=int, metavar="N", help="with --coordinator")
  add("--process-id", type=int, metavar="I", help="0 to N-1")
  add(
    "--join-timeout", type=int, default=300, metavar="S",
    help="seconds to wait for the others at the start (default %(default)s)",
  )  # fmt: skip
  add(
    "--lost-after", type=int, default=100, metavar="S",
    help="seconds without a sign of life (default %(default)s)",
  )  # fmt: skip


@contextlib.contextmanager
def joined(args: argparse.Namespace, workdir: str) -> Iterator[None]:
  """Runs a block as one of many processes, if the options say so.

  Output of all but the first is off. Whatever ends one process ends the others,
  soon: they may be waiting for it, or be about to end for the same reason.

  Raises:
    UserError: the others cannot be found, or an option is missing.
  """
  address = args.coordinator, args.num_processes, args.process_id
  if not args.distributed and address == (None, None, None):
    yield
    return
  index, count = _join(args)
  if index:
    sys.stdout = open(os.devnull, "w")
  try:
    start = processes.from_first(secrets.randbits(31))
    place = _shared_folder(workdir)
    with Peers(place, start, index, count, args.lost_after) as peers:
      try:
        yield
      except UserError as e:
        text = f"moejax: process {index} of {count}: {e}"
        with contextlib.suppress(OSError):  # nobody may listen any more
          print(text, file=sys.stderr, flush=True)
        peers.leave(str(e))
        peers.wait_for_others()
        _exit(2)
      except Exception as e:
        if (lost := peers.find_lost(e)) is None:
          with contextlib.suppress(OSError):
            traceback.print_exc()
          peers.leave(f"{type(e).__name__}: {e}")
          peers.wait_for_others()
          _exit(1)
        peers.stop_for(lost)
  finally:
    sys.stdout.flush()


def _shared_folder(workdir: str) -> pathlib.Path:
  """Where processes leave signs of life.

  At an address a file a second would cost more than it tells: those of one host
  see each other in a folder of it, and JAX's own heartbeat, which is slower and
  says less, watches the hosts.
  """
  found = storage.address(workdir)
  if found is None:
    return pathlib.Path(workdir)
  digest = hashlib.sha256(found.encode()).hexdigest()[:16]
  return cache_folder("processes") / digest


def _join(args: argparse.Namespace) -> tuple[int, int]:
  """The number of this process, and how many there are."""
  given = (args.coordinator, args.num_processes, args.process_id)
  if any(x is not None for x in given) and None in given:
    raise UserError(
      "--coordinator, --num-processes and --process-id go together; "
      "--distributed alone finds them on Cloud TPU, Slurm, GKE and Open MPI"
    )
  if args.coordinator and not re.fullmatch(r".+:\d+", args.coordinator):
    raise UserError(
      f"--coordinator={args.coordinator} is not HOST:PORT, such as node-0:12355"
    )
  # JAX ends a process whose time is up by a crash: our clock is to be first,
  # here as in the watch that names who is lost.
  joined = threading.Event()
  threading.Thread(target=_watch_join, args=(args, joined), daemon=True).start()
  try:
    jax.distributed.initialize(
      *given, initialization_timeout=args.join_timeout + 30,
      heartbeat_timeout_seconds=args.lost_after + 20,
    )  # fmt: skip
  except (ValueError, RuntimeError) as e:
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200].rstrip(".")
    raise UserError(
      f"cannot join other processes: {reason}; name them by --coordinator, "
      "--num-processes and --process-id"
    ) from e
  finally:
    joined.set()
  try:
    return jax.process_index(), jax.process_count()
  except RuntimeError as e:
    raise UserError(f"no devices: {str(e).splitlines()[0]}") from e


def _watch_join(args: argparse.Namespace, joined: threading.Event) -> None:
  """Says that this waits, and ends the process when its time is up."""
  where = args.coordinator or "the coordinator"
  if joined.wait(min(_SILENT, args.join_timeout)):
    return
  print(
    f"waiting for the others at {where}, up to {args.join_timeout} s...",
    flush=True,
  )
  if joined.wait(max(args.join_timeout - _SILENT, 0)):
    return
  me = "" if args.process_id is None else f"process {args.process_id} "
  text = (
    f"moejax: {me}could not join the others at {where} within "
    f"{args.join_timeout} s; do all run, with the same --coordinator and "
    "--num-processes, and can they reach it? --join-timeout waits longer\n"
  )
  os.write(2, text.encode())
  os._exit(2)


def _exit(status: int) -> None:
  """At once: JAX's own exit waits for processes that may never come."""
  with contextlib.suppress(OSError):
    sys.stderr.flush()
  os._exit(status)
