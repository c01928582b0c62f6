"""A trainer that learns nothing and remembers the numbers of all records: whether each came once, and in order.

It takes the streams as any trainer does, by the same code. A record may only be missing where its body died before it
was fetched; any other is an unexplained loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import zmq

from ami_shared.bus import HubAddress
from ami_shared.config import agreement, load_config
from ami_shared.control import ControlLink, Hooks
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.metrics import MetricsQueue
from ami_shared.records import RecordBatch
from ami_trainer.intake import Intake


@dataclass
class Life:
    """What was seen of one incarnation of a body: records from `first` up to `end`, but for the gaps.

    Attributes:
        acted_at: time of the last record, seconds since the epoch.
    """

    body: str
    first: int
    end: int
    acted_at: float
    gaps: list[tuple[int, int]] = field(default_factory=list)


class Auditor:
    """A member of a running system, from now on until close()."""

    def __init__(self, overrides: Sequence[str], name: str = "auditor", history: int = 1 << 40) -> None:
        """Args:
        overrides: the configuration of the system, its hub included.
        history: how many records of a body's life before this one came are asked for.
        """
        config = load_config(list(overrides))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate()
        hub, identity = HubAddress.parse(config.hub), Identity(name, "trainer", agreement(config), saves=False)
        self.link = ControlLink(self._context, hub, identity, self._gate, MetricsQueue(), Hooks(self._statistics))
        self._gate.on_wish = self._confirm
        self.intake = Intake(self._context, hub, identity, self._consume, history, self.link.send, self._pass_cut)
        self.lives: dict[str, Life] = {}
        self.out_of_order = 0
        self.longest_pause_s = 0.0  # between two steps of a life, as the bodies tell
        self.link.start()
        self.link.wait_joined(20.0)
        self._confirm()
        self.intake.start()

    def _confirm(self) -> None:
        desired = self._gate.desired
        self._gate.confirm("paused" if desired.paused else "running", desired)

    def _statistics(self) -> dict[str, object]:
        return self.intake.statistics()

    def _consume(self, batch: RecordBatch, continues: bool) -> None:
        life = self.lives.setdefault(
            batch.incarnation, Life(batch.body, batch.first_sequence, batch.first_sequence, batch.times[0])
        )
        self.out_of_order += batch.first_sequence < life.end
        if batch.first_sequence > life.end:
            life.gaps.append((life.end, batch.first_sequence))
        self.longest_pause_s = max(self.longest_pause_s, *np.diff(batch.times, prepend=life.acted_at))
        life.end, life.acted_at = batch.end, float(batch.times[-1])

    def _pass_cut(self) -> None:
        """It has nothing to save: it does not stand still at a checkpoint's cut."""
        if self.intake.feeder.cut:
            self.intake.feeder.pass_cut(self.intake.feeder.cut)

    @property
    def records(self) -> int:
        """How many records came."""
        return sum(life.end - life.first for life in self.lives.values()) - self.unexplained

    @property
    def behind(self) -> int:
        """How many records exist that have not come yet."""
        return sum(stream.behind for stream in list(self.intake.streams.values()))

    @property
    def unexplained(self) -> int:
        """How many records of lives are missing although later ones of the same life came."""
        return sum(end - first for life in self.lives.values() for first, end in life.gaps)

    def close(self) -> None:
        """Leave the system."""
        self.intake.close()
        self.link.leave()
        self._context.destroy(linger=500)
