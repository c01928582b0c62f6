"""The parameter stream's sending end: copies a model between two gradient steps, seals and sends it beside them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import zmq
from torch import nn

from ami_shared import wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, make_socket
from ami_shared.clock import Every
from ami_shared.membership import Identity
from ami_shared.models.parameters import read_arrays
from ami_shared.priority import set_thread_priority
from ami_shared.settled import Settled
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Array

log = logging.getLogger(__name__)

Arrays = dict[str, Array]


@dataclass
class Slots:
    """Host copies of one model: one waiting to be sent, one being sent, one kept as the last sent."""

    free: list[Arrays] = field(default_factory=lambda: [{}, {}, {}])
    waiting: tuple[int, float, Arrays] | None = None
    last: Snapshot | None = None
    version: int = 0


class SnapshotPublisher(threading.Thread):
    """Publishes snapshots of models: at most one per interval, and the newest when late."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        identity: Identity,
        models: Mapping[str, nn.Module],
        interval_s: float,
        priority: str = "normal",
    ) -> None:
        """Args:
        interval_s: seconds between two snapshots at least.
        priority: of the thread that seals and sends, see ami_shared.priority.
        """
        super().__init__(name="publisher", daemon=True)
        self._identity, self._models, self._priority = identity, dict(models), priority
        self._slots = {name: Slots() for name in models}
        self._repeat: set[str] = set()
        self._repeat_due = Every(1.0, first_after_s=0.0)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = False
        self._notice: Settled | None = None
        self._due = Every(interval_s, first_after_s=0.0)
        self._socket = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.PARAMETERS_IN), options=PARAMETERS)
        self.published = self.poisoned = 0
        self.copy_ms = 0.0

    def continue_from(self, known: Mapping[str, int]) -> None:
        """Let versions grow from those that the system knows of."""
        for model, slots in self._slots.items():
            slots.version = max(slots.version, known.get(model, 0))

    def offer_if_due(self, now: float) -> bool:
        """Publish all models as they are now if the interval has passed. Called between two gradient steps."""
        if not self._due.due(now):
            return False
        self.offer()
        return True

    def offer(self) -> None:
        """Publish all models as they are now. Called between two gradient steps."""
        begin = time.perf_counter()
        for model, module in self._models.items():
            self._copy(self._slots[model], module)
        self.copy_ms = (time.perf_counter() - begin) * 1e3
        self._wake.set()

    def settle(self, frontiers: Mapping[str, int]) -> None:
        """Say, after what has been offered, that all records before these frontiers have been learned from."""
        with self._lock:
            self._notice = Settled(self._identity.name, dict(frontiers), {})
        self._wake.set()

    @property
    def versions(self) -> dict[str, int]:
        """Version of each model as offered last."""
        return {model: slots.version for model, slots in self._slots.items()}

    def _copy(self, slots: Slots, module: nn.Module) -> None:
        with self._lock:
            arrays = slots.waiting[2] if slots.waiting else slots.free.pop()
            slots.waiting = None
        read_arrays(module, arrays)
        with self._lock:
            slots.version += 1
            slots.waiting = (slots.version, time.time(), arrays)

    def repeat_for(self, known: Mapping[str, int]) -> None:
        """Send the last snapshot again if the controller does not know it, e.g. because it was started anew."""
        behind = {m for m, slots in self._slots.items() if slots.last and known.get(m, 0) < slots.last.version}
        if behind and self._repeat_due.due(time.monotonic()):
            self._repeat |= behind
            self._wake.set()

    def close(self) -> None:
        """Send what waits and end the thread."""
        self._ending = True
        self._wake.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        set_thread_priority(self._priority)
        while not self._ending:
            self._wake.wait()
            self._wake.clear()
            self._send_all_waiting()
        self._send_all_waiting()
        self._socket.close(linger=500)

    def _send_all_waiting(self) -> None:
        with self._lock:
            notice, self._notice = self._notice, None
        for model, slots in self._slots.items():
            self._send_waiting(model, slots)
        if notice:  # names what was sent: nobody is to wait for a version that was refused
            sent = {model: slots.last.version for model, slots in self._slots.items() if slots.last}
            notice = replace(notice, versions=sent)
            self._socket.send_multipart(wire.encode(notice.to_message(self._identity.incarnation)))

    def _send_waiting(self, model: str, slots: Slots) -> None:
        with self._lock:
            waiting, slots.waiting = slots.waiting, None
            again, last = model in self._repeat, slots.last
            self._repeat.discard(model)
        if waiting is None:
            if again and last:
                self._send(last)
            return
        version, created, arrays = waiting
        if not all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind in "fc"):
            self._refuse(slots, model, version, arrays)
            return
        snapshot = Snapshot.seal(model, version, created, arrays)
        self._send(snapshot)
        with self._lock:
            if slots.last:
                slots.free.append(dict(slots.last.arrays))
            slots.last = snapshot
        self.published += 1

    def _refuse(self, slots: Slots, model: str, version: int, arrays: Arrays) -> None:
        """Keep parameters that are not finite from everybody."""
        with self._lock:
            slots.free.append(arrays)
        self.poisoned += 1
        if self.poisoned == 1:
            log.error("version %d of %s is not finite: not published", version, model)

    def _send(self, snapshot: Snapshot) -> None:
        message = snapshot.to_message(self._identity.name, self._identity.incarnation)
        self._socket.send_multipart(wire.encode(message))

    def statistics(self) -> dict[str, Any]:
        """Return the newest version, age and size of each model."""
        now = time.time()
        return {
            model: {
                "version": slots.version,
                "age_s": now - slots.last.created if slots.last else None,
                "bytes": slots.last.nbytes if slots.last else 0,
            }
            for model, slots in self._slots.items()
        }
