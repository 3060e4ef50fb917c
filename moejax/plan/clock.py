# SPDX-License-Identifier: Apache-2.0
"""When collectives are over, and how long a program waits for them."""

import dataclasses

from moejax.plan.collectives import Collective


@dataclasses.dataclass
class Sent:
  """A collective, all its runs together.

  Attributes:
    collective, runs: what, and how often.
    done: when one run is over, on the clock of its computation.
    waits: seconds that the program stands still for it, in all runs.
  """

  collective: Collective
  runs: int
  done: float
  waits: float = 0.0


class Clock:
  """Time within one run of a computation: of the device and of its network."""

  def __init__(self):
    self.now = self._free = 0.0
    self._under_way: dict[str, list[Sent]] = {}

  def send(self, name: str, collective: Collective, runs: int) -> Sent:
    """Begins a collective as soon as the network is free."""
    self._free = max(self.now, self._free) + collective.seconds
    sent = Sent(collective, runs, self._free)
    self._under_way.setdefault(name, []).append(sent)
    return sent

  def wait(self, name: str) -> None:
    """Until what was sent under a name is there."""
    for sent in self._under_way.pop(name, ()):
      late = max(sent.done - self.now, 0.0)
      sent.waits += late * sent.runs
      self.now += late

  def end(self) -> float:
    """When all is done."""
    for name in list(self._under_way):
      self.wait(name)
    return self.now
