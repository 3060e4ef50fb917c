# SPDX-License-Identifier: Apache-2.0
"""What is asked of the C library's heap, and peak rates."""

import pathlib
import platform
import subprocess
import sys

import pytest

from moejax.hardware import machine_memory, peak_flops

GLIBC = platform.libc_ver()[0] == "glibc"
SMAPS = pathlib.Path("/proc/self/smaps")

PROGRAM = """
import ctypes, re, sys
from moejax.hardware import keep_freed_memory
before = open("/proc/self/statm").read().split()[1]
assert keep_freed_memory()
after = open("/proc/self/statm").read().split()[1]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
block = libc.malloc(256 << 20)
ctypes.memset(block, 1, 256 << 20)
libc.free(block)
again = libc.malloc(256 << 20)
smaps = open("/proc/self/smaps").read()
regions = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", smaps)
def holds(region):
  first, last = (int(x, 16) for x in region.split()[0].split("-"))
  return first <= block + (128 << 20) < last
home, = [r for r in regions if r and holds(r)]
print(int(after) - int(before), again == block, "[heap]" in home,
      " hg" in re.search("VmFlags:(.*)", home)[1])
"""


@pytest.mark.skipif(not (GLIBC and SMAPS.exists()), reason="needs glibc, Linux")
def test_freed_blocks_are_kept_and_huge_pages_asked_for():
  out = subprocess.run(
    [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
  ).stdout.split()
  pages_taken, *kept = out
  assert int(pages_taken) < 2000, "only addresses are taken, no memory"
  assert kept == ["True", "True", "True"]


class Device:
  def __init__(self, device_kind):
    self.device_kind = device_kind


def test_peak_rates_by_the_longest_name():
  assert peak_flops(Device("TPU v5 lite")) == 197e12
  assert peak_flops(Device("TPU v5")) == 459e12
  assert peak_flops(Device("NVIDIA H100 80GB HBM3")) == 989e12
  assert peak_flops(Device("cpu")) is None


@pytest.mark.parametrize(
  "line, files, limit",
  [
    ("0::/jobs/one", {"memory.max": "max", "jobs/memory.max": "7000"}, 7000),
    ("0::/jobs/one", {"jobs/memory.max": "7", "jobs/one/memory.max": "5"}, 5),
    # In a container, whose own group is the top and has another path outside.
    ("0::/docker/abc", {"memory.max": "6000"}, 6000),
    ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "8000"}, 8000),
    ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "8000"}, None),
    ("0::/", {"memory.max": "max"}, None),
  ],
)
def test_limits_of_containers_and_jobs(line, files, limit, tmp_path):
  (tmp_path / "proc/self").mkdir(parents=True)
  (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/x\n{line}\n")
  for name, text in files.items():
    file = tmp_path / "sys/fs/cgroup" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")
  whole = machine_memory(tmp_path / "nothing")
  assert machine_memory(tmp_path) == (limit or whole) and whole > 1 << 30
