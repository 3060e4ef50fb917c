# SPDX-License-Identifier: Apache-2.0
"""What all tests share: JAX on a CPU, a compile cache, strictness, test data.

The environment is set here, before JAX is imported, so processes that a test
starts inherit it.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Longest first.
MINUTES = (
  "multi_process/test_training.py", "test_readme.py", "faults/test_headline.py",
  "sweep/test_command.py", "faults/test_fuzz.py", "test_train.py",
  "parallel/test_expert_parallel.py", "test_notebooks.py",
  "invariance/test_parts.py", "faults/test_data.py", "faults/test_signals.py",
  "faults/test_environment.py", "faults/test_published.py",
  "faults/test_disk.py", "convert/test_upcycle_command.py", "test_phases.py",
  "parallel/test_mesh.py", "analysis/test_command.py",
  "invariance/test_grid.py",
)  # fmt: skip
MAX_CACHE_BYTES = 2 << 30
CACHE = pathlib.Path(
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without both, the many small programs of tests are not kept.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# libtpu asks a cloud's metadata server for its chips, where there is neither.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_configure(config):
  if not hasattr(config, "workerinput"):  # once, not in each xdist worker
    _empty_full_cache()

  import jax
  from absl import flags

  # Most programs here run once: compiling them well costs more than it saves.
  # Commands that tests start as processes are compiled as their users' are.
  jax.config.update("jax_disable_most_optimizations", True)
  # Meshes are tried on parts of one CPU; what asks for no mesh uses the first.
  jax.config.update("jax_num_cpu_devices", 8)
  # [T, E] + [E] works by accident until T == E; say it with an axis.
  jax.config.update("jax_numpy_rank_promotion", "raise")
  flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
  """Files of minutes first: at the end, one of two processes would wait."""
  place = {ROOT / "tests" / name: number for number, name in enumerate(MINUTES)}
  last = len(MINUTES)
  items.sort(key=lambda i: place[i.path] if i.path in place else last)


def _empty_full_cache():
  """Edited code leaves entries that no later run reads."""
  if CACHE != ROOT / ".jax_cache" or not CACHE.exists():
    return
  sizes = [path.stat().st_size for path in CACHE.iterdir() if path.is_file()]
  if sum(sizes) > MAX_CACHE_BYTES:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
  """Else a process that runs all tests holds gigabytes of them."""
  yield
  import jax

  jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Folder of public test data: `$MOEJAX_TEST_DATA` or `../shared/data`."""
  folder = os.environ.get("MOEJAX_TEST_DATA")
  path = pathlib.Path(folder) if folder else ROOT.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip(
      "no test data: set MOEJAX_TEST_DATA or put it in shared/data beside the "
      "checkout"
    )
  return path


@pytest.fixture
def small_disk(tmp_path):
  """A filesystem of 4 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting needs root")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)
