# SPDX-License-Identifier: Apache-2.0
"""Makes token stores: plans parts, has them written, puts the store in place.

A store grows in `FOLDER.partial` and is renamed when it is complete. Each part
of the source becomes one shard a split, whoever writes it, so the bytes do not
depend on the number of processes, and after a crash only unfinished parts are
done again.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from moejax.config import DataConfig
from moejax.data import manifest as manifest_lib
from moejax.data import parts, remote, sources, store, workers
from moejax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moejax.errors import DataError
from moejax.files import write_atomically
from moejax.progress import format_count, format_seconds, progress_bar

SOURCES = "sources.json"
MIN_PART_BYTES = 2 << 20
MAX_PART_BYTES = 256 << 20
_TARGET_PARTS = 64
# With less text than this each, processes cost more than they save.
_BYTES_PER_PROCESS = 32 << 20
_BPE_BYTES_PER_PROCESS = 2 << 20

Say = Callable[[str], None]


def prepare(
  config: DataConfig,
  *,
  processes: int = 0,
  rebuild: bool = False,
  say: Say = print,
) -> list[pathlib.Path]:
  """Makes the token store of each source, or finds it ready.

  Args:
    config: sources, tokenizer, row length and where the stores go.
    processes: how many tokenise at a time; 0 takes what the machine has.
    rebuild: makes stores anew that are damaged, or whose source files have
      changed since.
    say: gets the lines to tell the person.

  Returns:
    the folders of the stores, in the order of `config.sources`.

  Raises:
    DataError: a source is missing, empty, damaged or changed; the tokenizer
      cannot be used; the store cannot be written. Nothing half-written is left
      under a store's name.
  """
  tokenizer = load_tokenizer(config.tokenizer)
  return [
    _prepare_source(config, spec, tokenizer, processes, rebuild, say)
    for spec in config.sources
  ]


def _prepare_source(
  config: DataConfig,
  spec: str,
  tokenizer: Tokenizer,
  processes: int,
  rebuild: bool,
  say: Say,
) -> pathlib.Path:
  folder = store.store_path(config, spec, tokenizer)
  if not rebuild:  # what is there may be what is to be replaced
    remote.fetch(config, folder)
  source = sources.open_source(spec, config.text_key)
  finished = (folder / manifest_lib.MANIFEST).exists()
  known = store.read_verified(folder)["sources"]
  digests = _digest_sources(source, known)
  if finished:
    changed = _changed_files(folder, digests)
    if not changed and (opened := _open(folder, tokenizer, rebuild)):
      store.remember_verified(folder, sources=digests)
      remote.send(config, folder, again=rebuild)
      say(f"{spec}: ready, {_describe(opened.manifest)} in {folder}")
      return folder
    if changed and not rebuild:
      raise DataError(
        f"{spec} has changed since {folder} was prepared ({changed}); train on "
        "it as it is, or make it anew with: moejax data prepare --rebuild ..."
      )
  start = time.monotonic()
  building = folder.with_name(folder.name + ".partial")
  with _locked(building):
    plan = _plan(config, spec, source, tokenizer, digests)
    _start_or_continue(building, plan, tokenizer, say)
    _write_parts(building, plan, source, tokenizer, processes, spec)
    manifest = _finish(building, plan, tokenizer, digests, spec)
    _put_in_place(building, folder)
  remote.send(config, folder, again=rebuild)
  seconds = format_seconds(time.monotonic() - start)
  say(f"{spec}: {_describe(manifest)} in {folder}, {seconds}")
  if config.validation_fraction and "validation" not in manifest["splits"]:
    say(
      f"{spec}: none of its {manifest['documents']} documents fell into "
      "validation (a text file is one document, or a few beyond 256 KiB); for "
      "an evaluation split the text into more, or raise "
      f"data.validation_fraction={config.validation_fraction}; without one set "
      "eval.every=0"
    )
  return folder


def _open(
  folder: pathlib.Path, tokenizer: Tokenizer, rebuild: bool
) -> store.TokenStore | None:
  """The store, checked; None if it is damaged and may be rebuilt."""
  try:
    return store.TokenStore.open(folder, tokenizer)
  except DataError:
    if rebuild:
      return None
    raise


def _digest_sources(
  source: sources.Source, known: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Digests with progress where it takes long."""
  try:
    total = sum(source.path(n).stat().st_size for n in source.names)
  except OSError as e:
    raise DataError(f"cannot read {e.filename}: {e.strerror}") from None
  if total < MAX_PART_BYTES or known:
    return source.digests(known, lambda count: None)
  with progress_bar(f"reading {source.identity}", total) as bar:
    return source.digests(known, bar.advance)


def _changed_files(
  folder: pathlib.Path, digests: dict[str, dict[str, Any]]
) -> str:
  """Which source files differ from those that the store was made of."""
  now = {name: entry["sha256"] for name, entry in digests.items()}
  try:
    then = json.loads((folder / SOURCES).read_text())
  except (OSError, ValueError):
    return f"{SOURCES} is missing or damaged"
  changed = [n for n in sorted({*now, *then}) if now.get(n) != then.get(n)]
  if not changed:
    return ""
  more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
  return ", ".join(changed[:3]) + more


def _plan(
  config: DataConfig,
  spec: str,
  source: sources.Source,
  tokenizer: Tokenizer,
  digests: dict[str, dict[str, Any]],
) -> parts.Plan:
  units = source.units()
  total = sum(file.count * file.unit_bytes for file in units)
  size = min(max(total / _TARGET_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
  slices = sources.plan_parts(units, size)
  if not slices:
    raise DataError(f"{spec} is empty: there is no document in it")
  return parts.Plan(
    key=store.store_key(config, spec, tokenizer),
    spec=spec,
    digests={name: entry["sha256"] for name, entry in digests.items()},
    parts=[[[s.file, s.start, s.stop] for s in part] for part in slices],
    part_bytes=[
      sum((s.stop - s.start) * units[s.file].unit_bytes for s in part)
      for part in slices
    ],
  )


@contextlib.contextmanager
def _locked(building: pathlib.Path) -> Iterator[None]:
  """Holds the folder against a second `prepare`; freed if this process dies."""
  try:
    building.mkdir(parents=True, exist_ok=True)
    lock = open(building / "lock", "w")
  except OSError as e:
    raise DataError(f"cannot write {building}: {e.strerror}") from None
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise DataError(
        f"another process is preparing {building}; wait for it"
      ) from None
    except OSError:
      pass  # a file system without locks
    yield


def _start_or_continue(
  building: pathlib.Path, plan: parts.Plan, tokenizer: Tokenizer, say: Say
) -> None:
  """Clears what another plan left; keeps the finished parts of this one."""
  try:
    unfinished = (building / parts.PLAN).read_text()
  except OSError:
    unfinished = None
  if unfinished == plan.text():
    done = len(list(building.glob("part-*.json")))
    say(f"going on: {done} of {len(plan.parts)} parts are done")
    for path in building.glob("*.partial"):
      path.unlink(missing_ok=True)
    return
  for path in building.iterdir():
    if path.name != "lock":
      path.unlink()
  try:
    tokenizer.save(building)
    write_atomically(building / parts.PLAN, plan.text())
  except OSError as e:
    raise DataError(f"cannot write {building}: {e.strerror}") from None


def _write_parts(
  building: pathlib.Path,
  plan: parts.Plan,
  source: sources.Source,
  tokenizer: Tokenizer,
  processes: int,
  spec: str,
) -> None:
  """Writes the parts that are not done yet."""
  count = range(len(plan.parts))
  left = [i for i in count if not (building / parts.part_name(i)).exists()]
  total = sum(plan.part_bytes[i] for i in left)
  if not processes:
    cheap = isinstance(tokenizer, ByteTokenizer)
    each = _BYTES_PER_PROCESS if cheap else _BPE_BYTES_PER_PROCESS
    processes = max(1, min(_cores(), int(total / each)))
  processes = min(processes, len(left))
  with progress_bar(f"tokenizing {spec}, MB", round(total / 1e6)) as bar:
    advance = _megabytes(bar.advance)
    if processes <= 1:
      for index in left:
        parts.write_part(building, plan, index, source, tokenizer, advance)
    else:
      workers.write_parts(building, left, processes, advance)


def _cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _megabytes(advance: Callable[[int], None]) -> Callable[[float], None]:
  """Tells bytes in whole megabytes."""
  rest = 0.0

  def advance_bytes(count: float) -> None:
    nonlocal rest
    rest += count
    if rest >= 1e6:
      advance(int(rest // 1e6))
      rest %= 1e6

  return advance_bytes


def _finish(
  building: pathlib.Path,
  plan: parts.Plan,
  tokenizer: Tokenizer,
  digests: dict[str, dict[str, Any]],
  spec: str,
) -> dict[str, Any]:
  """Writes the manifest and the metadata around finished parts."""
  summaries = [
    json.loads((building / parts.part_name(i)).read_text())
    for i in range(len(plan.parts))
  ]
  manifest = _manifest(plan, tokenizer, summaries)
  if "train" not in manifest["splits"]:
    shutil.rmtree(building)
    raise DataError(
      f"{spec} has no text to train on: {manifest['empty_documents']} empty "
      f"documents, {manifest['validation_documents']} in validation; split the "
      "text into more documents, or lower data.validation_fraction"
    )
  for split in manifest_lib.SPLITS:
    if split not in manifest["splits"]:
      for path in building.glob(f"{manifest_lib.DATASET}-{split}.*"):
        path.unlink()
  dtype = store.token_dtype(tokenizer.vocab_size)
  try:
    store.write_metadata(building, plan.key["seq_len"], dtype, manifest)
    (building / SOURCES).write_text(json.dumps(plan.digests, indent=1))
    text = json.dumps(manifest, indent=1, sort_keys=True)
    write_atomically(building / manifest_lib.MANIFEST, text)
  except OSError as e:
    raise DataError(f"cannot write {building}: {e.strerror}") from None
  shards = {}
  for info in manifest["splits"].values():
    for shard in info["shards"]:
      path = building / shard["name"]
      shards[shard["name"]] = store.file_state(path.stat())
  store.remember_verified(building, shards=shards, sources=digests)
  return manifest


def _manifest(
  plan: parts.Plan, tokenizer: Tokenizer, summaries: list[dict[str, Any]]
) -> dict[str, Any]:
  manifest = dict(plan.key)
  manifest["source_sha256"] = sources.text_digest(
    json.dumps(plan.digests, sort_keys=True)
  )
  manifest["tokenizer_name"] = tokenizer.name
  manifest["vocab_size"] = tokenizer.vocab_size
  manifest["dtype"] = store.token_dtype(tokenizer.vocab_size).str
  for name in summaries[0]:
    if name != "shards":
      manifest[name] = sum(summary[name] for summary in summaries)
  manifest["splits"] = {}
  for split in manifest_lib.SPLITS:
    shards = [summary["shards"][split] for summary in summaries]
    rows = sum(shard["rows"] for shard in shards)
    if rows:
      used = sum(shard["used_slots"] for shard in shards)
      manifest["splits"][split] = {
        "rows": rows,
        "fill": round(used / (rows * (plan.key["seq_len"] + 1)), 6),
        "shards": shards,
      }
  return manifest


def _put_in_place(building: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames the finished store; an outdated one steps aside first."""
  for path in building.glob("part-*.json"):
    path.unlink()
  (building / parts.PLAN).unlink()
  (building / "lock").unlink()
  if folder.exists():
    old = folder.with_name(f"{folder.name}.{os.getpid()}.old")
    os.replace(folder, old)
  os.replace(building, folder)
  # Also what an interrupted rebuild left.
  for old in folder.parent.glob(f"{folder.name}.*.old"):
    shutil.rmtree(old)


def _describe(manifest: dict[str, Any]) -> str:
  splits = manifest["splits"]
  train = splits["train"]
  validation = splits["validation"]["rows"] if "validation" in splits else 0
  text = (
    f"{manifest['documents']:,} documents, "
    f"{format_count(manifest['tokens'])} tokens, {train['rows']:,} rows of "
    f"{manifest['seq_len']} ({train['fill']:.1%} full), {validation:,} for "
    "validation"
  )
  if manifest["replaced"]:
    text += f", {manifest['replaced']:,} invalid UTF-8 sequences replaced"
  if manifest["empty_documents"]:
    text += f", {manifest['empty_documents']:,} empty documents skipped"
  return text
