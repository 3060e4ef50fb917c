# SPDX-License-Identifier: Apache-2.0
"""Where the workers of a sweep compute."""

from moejax.sweep.worker import places


def test_each_worker_has_a_gpu_of_its_own():
  name, memory = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"
  assert places(1, ["0", "1"]) == [{}]  # one run may use them all
  assert places(3, []) == [{}, {}, {}]
  assert places(2, ["4", "6"]) == [{name: "4"}, {name: "6"}]
  found = places(3, ["0", "1"])
  assert [p[name] for p in found] == ["0", "1", "0"]
  assert {p[memory] for p in found} == {"0.450"}
