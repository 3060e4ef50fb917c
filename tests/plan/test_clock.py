# SPDX-License-Identifier: Apache-2.0
"""How long a program waits for what it sends meanwhile."""

import pytest

from moejax.plan.chips import CHIPS
from moejax.plan.clock import Clock
from moejax.plan.collectives import Collective, Fabric
from moejax.plan.network import Torus
from moejax.plan.program import Program
from moejax.plan.roofline import measure

CHIP = CHIPS["TPU v5"]
LINE = Torus(CHIP, ((0, 0, 0), (0, 0, 1)), (1, 1, 2), 1)


def collective(seconds):
  return Collective("all-reduce", ("data",), 1.0, seconds, "")


def test_what_is_left_is_waited_for():
  clock = Clock()
  sent = clock.send("a", collective(3.0), runs=10)
  clock.now += 2.0
  clock.wait("a")
  assert (clock.now, sent.waits) == (3.0, 10.0)
  clock.wait("a")  # nothing is under way any more
  assert clock.now == 3.0


def test_the_network_takes_one_after_another():
  clock = Clock()
  first = clock.send("a", collective(2.0), runs=1)
  second = clock.send("b", collective(2.0), runs=1)
  clock.now += 3.0
  assert clock.end() == 4.0
  assert (first.waits, second.waits) == (0.0, 1.0)


# 4 MiB travel, 2 (n - 1) / n of them each way; the copy writes and reads.
STEP = """
%body (s: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {{
  %s = (s32[], f32[1048576]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1048576] get-tuple-element(%s), index=1
{lines}
  ROOT %t = (s32[], f32[1048576]) tuple(%i, %r)
}}

ENTRY %main (p: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {{
  %p = (s32[], f32[1048576]) parameter(0)
  ROOT %w = (s32[], f32[1048576]) while(%p), condition=%c, body=%body, \
backend_config={{"known_trip_count":{{"n":"7"}}}}
}}
"""
SIZE = 4 * 2**20
COPY = 2 * SIZE / CHIP.bandwidth
SENT = SIZE / CHIP.link
GROUPS = "replica_groups={{0,1}}, to_apply=%add"


def test_a_loop_that_never_runs():
  text = STEP.format(lines="  %r = f32[1048576] copy(%x)\n")
  program = Program.parse(text.replace('"n":"7"', '"n":"0"'))
  assert measure(program, Fabric((("data", 2),), LINE), 0).seconds == 0


@pytest.mark.parametrize(
  "lines, waits",
  [
    # The program stands still.
    (f"  %r = f32[1048576] all-reduce(%x), {GROUPS}\n", SENT),
    # It copies meanwhile.
    (
      f"  %g = f32[1048576] all-reduce-start(%x), {GROUPS}\n"
      "  %y = f32[1048576] copy(%x)\n"
      "  %r = f32[1048576] all-reduce-done(%g)\n",
      SENT - COPY,
    ),
    # Asynchronous by name alone.
    (
      f"  %g = f32[1048576] all-reduce-start(%x), {GROUPS}, "
      'backend_config={"is_sync":true}\n'
      "  %y = f32[1048576] copy(%x)\n"
      "  %r = f32[1048576] all-reduce-done(%g)\n",
      SENT,
    ),
  ],
)
def test_a_loop_that_waits(lines, waits):
  program = Program.parse(STEP.format(lines=lines))
  found = measure(program, Fabric((("data", 2),), LINE), 0)
  assert found.waits == pytest.approx(7 * waits)
  assert found.waits + found.hidden == pytest.approx(7 * SENT)
  assert found.seconds == pytest.approx(found.local + 7 * waits)
