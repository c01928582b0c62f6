"""The experience stream's receiving end: a thread that puts records into the trainer's buffer, in order, once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from ami_shared import wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, SocketOptions, make_socket
from ami_shared.clock import Every, Rate
from ami_shared.errors import WireError
from ami_shared.records import TOPIC, RecordBatch
from ami_trainer.frontier import Frontiers

log = logging.getLogger(__name__)

POLL_MS = 100


class Intake(threading.Thread):
    """Receives the experience of all bodies."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        consume: Callable[[RecordBatch, bool], None],
        on_consumed: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        consume: takes a batch of new records, and whether it continues the body's last one without a gap;
            raises WireError where the records do not fit. Called in the intake's thread.
        on_consumed: called after that, when `consumed` tells of the batch too.
        """
        super().__init__(name="intake", daemon=True)
        self._consume, self._on_consumed = consume, on_consumed
        self._frontiers = Frontiers()
        self._ending = threading.Event()
        self._socket = make_socket(
            context,
            zmq.SUB,
            connect=hub.endpoint(Port.EXPERIENCE_OUT),
            options=SocketOptions(EXPERIENCE.queue, EXPERIENCE.max_frame_bytes, b"", (TOPIC,)),
        )
        self._rate = Rate()
        self.consumed: dict[str, tuple[str, int]] = {}
        self._complained = Every(10.0, first_after_s=0.0)
        self.records = 0
        self.wire_errors = 0

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        while not self._ending.is_set():
            if self._socket.poll(POLL_MS):
                self._receive()
        self._socket.close()

    def _receive(self) -> None:
        frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
        try:
            self._take(RecordBatch.from_message(wire.decode(frames)))
        except WireError as error:
            self.wire_errors += 1
            if self._complained.due(time.monotonic()):
                log.warning("malformed experience dropped (%d so far): %s", self.wire_errors, error)

    def _take(self, batch: RecordBatch) -> None:
        accepted = self._frontiers.accept(batch.body, batch.incarnation, batch.first_sequence, len(batch))
        if accepted.lost:
            log.warning("%d records of %s before %d are lost", accepted.lost, batch.body, batch.first_sequence)
        fresh = batch.tail(accepted.skip)
        if not len(fresh):
            return
        try:
            self._consume(fresh, accepted.continues)
        except WireError:
            self._frontiers.refuse(batch.body, len(fresh))
            raise
        self.consumed[batch.body] = (batch.incarnation, fresh.first_sequence + len(fresh))
        self.records += len(fresh)
        self._on_consumed()

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the stream at this end."""
        return {
            "received": self._frontiers.received(),
            "lost": self._frontiers.lost(),
            "duplicates": sum(frontier.duplicates for frontier in list(self._frontiers.bodies.values())),
            "intake_rate_hz": self._rate.update(time.monotonic(), self.records),
            "experience_wire_errors": self.wire_errors,
        }
