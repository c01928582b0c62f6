"""The parameter stream's sending end: copies a model between two gradient steps, and publishes it in a thread.

The copy is made into memory that processes of the same host can see. Its bytes are sent only to subscribers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import zmq
from torch import nn

from ami_shared import limits, wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, dial
from ami_shared.clock import Clock, Every, SystemClock
from ami_shared.links import LinkWatch
from ami_shared.membership import Identity
from ami_shared.models.device import device_of, pinned_for
from ami_shared.models.parameters import layout_of
from ami_shared.priority import set_thread_priority
from ami_shared.sending import send_in_place
from ami_shared.settled import Settled
from ami_shared.shared_memory import Piece, Pool
from ami_shared.snapshots import Layout, Notice, Snapshot, topic
from ami_shared.subscriptions import Subscriptions
from ami_trainer.copying import Copying

log = logging.getLogger(__name__)

HEAR_EVERY_S = 1.0
OWED_EVERY_S = 0.02


@dataclass
class Copy:
    """A model's parameters as they were between two gradient steps, in memory of their own.

    Attributes:
        made: tells whether they are finite, and may be published.
        sending: trackers of messages that are still sent from that memory.
    """

    snapshot: Snapshot
    piece: Piece
    made: Copying
    sending: list[zmq.MessageTracker] = field(default_factory=list)


@dataclass
class Model:
    """One model, and its copies: at most one that is waiting to be sent, the last one sent, and superseded ones.

    The memory of a superseded copy is reused as soon as it has been sent.

    Attributes:
        copying: the copy that is being made.
        overtaken: number of copies that were never sent, because a newer one was made first.
        owed: whether the last copy's bytes are wanted, and wait until earlier ones have been sent: if snapshots come
            faster than the line can carry them, it would drop parts of each.
    """

    module: nn.Module
    layout: Layout
    pool: Pool
    version: int = 0
    copying: Copying | None = None
    waiting: Copy | None = None
    last: Copy | None = None
    superseded: list[Copy] = field(default_factory=list)
    overtaken: int = 0
    owed: bool = False

    @property
    def line_is_free(self) -> bool:
        """Whether everything has been sent."""
        copies = [*self.superseded, *([self.last] if self.last else [])]
        return all(tracker.done for copy in copies for tracker in copy.sending)

    def take_piece(self) -> Piece:
        """Return memory for the next copy."""
        if self.waiting:
            unsent, self.waiting = self.waiting, None
            self.overtaken += 1
            return unsent.piece
        for copy in [copy for copy in self.superseded if all(tracker.done for tracker in copy.sending)]:
            self.superseded.remove(copy)
            self.pool.give_back(copy.piece)
        return self.pool.take()


def _model(module: nn.Module) -> Model:
    layout = layout_of(module)
    return Model(module, layout, Pool(layout.nbytes, pinned_for(device_of(module))))


class SnapshotPublisher(threading.Thread):
    """Publishes snapshots of models: at most one per interval, and only the newest if late."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        identity: Identity,
        models: Mapping[str, nn.Module],
        interval_s: float,
        priority: str = "normal",
        halved: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """Connect to the hub; snapshots leave once the thread is started.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            identity: of the trainer.
            models: name → module.
            interval_s: least seconds between two snapshots.
            priority: of the sending thread, see ami_shared.priority.
            halved: whether float32 is sent as bfloat16; shared memory keeps float32.
            clock: dates the snapshots.
        """
        super().__init__(name="publisher", daemon=True)
        self._clock = clock or SystemClock()
        self._identity, self._priority, self._halved = identity, priority, halved
        self._models = {name: _model(module) for name, module in models.items()}
        self._repeat: set[str] = set()
        self._repeat_due = Every(1.0, first_after_s=0.0)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = False
        self._settled: Settled | None = None
        self._due = Every(interval_s, first_after_s=0.0)
        self.link = LinkWatch()
        self._socket = dial(context, zmq.XPUB, hub, Port.PARAMETERS_IN, PARAMETERS, self.link)
        self._subscriptions = Subscriptions(self._socket, [topic(name) for name in models])
        self.published = self.poisoned = self._bytes_sent = 0
        self.copy_ms = 0.0

    def continue_from(self, known: Mapping[str, int]) -> None:
        """Let versions continue from those that the system knows, in case another process has published."""
        with self._lock:
            for name, model in self._models.items():
                model.version = max(model.version, known.get(name, 0))

    def offer_if_due(self, now: float) -> bool:
        """Publish all models as they are now if the interval has passed; return whether it did. Between two steps."""
        if not self._due.due(now):
            return False
        self.offer()
        return True

    def offer(self) -> None:
        """Publish all models as they are now. Called between two gradient steps."""
        begin = time.perf_counter()
        for name, model in self._models.items():
            self._copy(name, model)
            self._wake.set()
        self.copy_ms = (time.perf_counter() - begin) * 1e3

    def settle(self, frontiers: Mapping[str, int]) -> None:
        """Announce, after the offered snapshots, that all records before these frontiers have been learned from."""
        with self._lock:
            self._settled = Settled(self._identity.name, dict(frontiers), {})
        self._wake.set()

    @property
    def versions(self) -> dict[str, int]:
        """Return the version of each model as offered last, or a larger one that the system has had since."""
        return {name: model.version for name, model in self._models.items()}

    def _copy(self, name: str, model: Model) -> None:
        with self._lock:
            piece = model.take_piece()
        copying = Copying(model.layout, piece.content)
        if copying.worth_following:
            model.copying = copying
            self._wake.set()
        copying.make(model.module)
        with self._lock:
            model.version += 1
            snapshot = Snapshot(name, model.version, self._clock.time(), copying.arrays)
            model.copying, model.waiting = None, Copy(snapshot, piece, copying)

    def repeat_for(self, known: Mapping[str, int]) -> None:
        """Publish the last snapshot again if the controller does not know it, e.g. because it was restarted."""
        behind = {n for n, m in self._models.items() if m.last and known.get(n, 0) < m.last.snapshot.version}
        if behind and self._repeat_due.due(time.monotonic()):
            self._repeat |= behind
            self._wake.set()

    def close(self) -> None:
        """Send what is waiting, and end the thread."""
        self._ending = True
        self._wake.set()
        self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        set_thread_priority(self._priority)
        while not self._ending:
            self._wake.wait(OWED_EVERY_S if any(model.owed for model in self._models.values()) else HEAR_EVERY_S)
            self._wake.clear()
            self._follow_copies()
            self._send_all_waiting()
            self._subscriptions.hear()
        self._send_all_waiting()
        self.link.close()
        self._socket.close(linger=500)

    def _follow_copies(self) -> None:
        """Check the copy that is being made, following right behind."""
        for model in self._models.values():
            if copying := model.copying:
                copying.finite()

    def _send_all_waiting(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, None
        for name, model in self._models.items():
            self._send_waiting(name, model)
            if model.owed and (model.line_is_free or self._ending):
                self._send_bytes(model)
        if settled:  # names what was sent: nobody must wait for a refused version
            sent = {name: model.last.snapshot.version for name, model in self._models.items() if model.last}
            settled = replace(settled, versions=sent)
            self._socket.send_multipart(wire.encode(settled.to_message(self._identity.incarnation)))

    def _send_waiting(self, name: str, model: Model) -> None:
        with self._lock:
            waiting, model.waiting = model.waiting, None
            again, last = name in self._repeat, model.last
            self._repeat.discard(name)
        if waiting is None:
            if again and last:
                self._tell(last, model)
            return
        if not waiting.made.finite():
            self._refuse(waiting, model)
            return
        waiting.piece.unlock()
        self._tell(waiting, model)
        with self._lock:
            if last:
                model.superseded.append(last)
            model.last = waiting
        self.published += 1

    def _refuse(self, copy: Copy, model: Model) -> None:
        """Drop a copy that is not finite."""
        with self._lock:
            model.pool.give_back(copy.piece)
        self.poisoned += 1
        if self.poisoned == 1:
            log.error("version %d of %s is not finite: not published", copy.snapshot.version, copy.snapshot.model)

    def _tell(self, copy: Copy, model: Model) -> None:
        me, snapshot = self._identity, copy.snapshot
        notice = Notice(snapshot.model, snapshot.version, snapshot.created, copy.piece.reference, model.layout)
        self._socket.send_multipart(wire.encode(notice.to_message(me.name, me.incarnation)))
        repeats_what_is_on_its_way = copy is model.last and not model.owed and not model.line_is_free
        model.owed = self._subscriptions.want(topic(snapshot.model)) and not repeats_what_is_on_its_way

    def _send_bytes(self, model: Model) -> None:
        model.owed = False
        if copy := model.last:
            for part in copy.snapshot.to_parts(self._identity.name, self._identity.incarnation, self._halved):
                frames = wire.encode(part)
                copy.sending += send_in_place(self._socket, frames)
                self._bytes_sent += sum(map(len, frames))

    def counters(self) -> dict[str, int]:
        """Return the numbers of snapshots published, not finite, and superseded before being sent; and bytes sent."""
        return {
            "snapshots_published": self.published,
            "snapshots_overtaken": sum(model.overtaken for model in self._models.values()),
            "snapshot_bytes_sent": self._bytes_sent,
            "poisoned": self.poisoned,
        }

    def statistics(self) -> dict[str, Any]:
        """Return the newest version, age and size of each model."""
        now = self._clock.time()
        return {
            name: {
                "version": model.version,
                "age_s": now - last.snapshot.created if (last := model.last) else None,
                "bytes": last.snapshot.nbytes if last else 0,
            }
            for name, model in self._models.items()
        }
