"""The experience stream's sending end: a thread that batches records by count and age and publishes them.

The loop only appends to a queue; nothing that happens on the wire can hold it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from itertools import takewhile

import zmq

from ami_inference.batching import Batcher
from ami_shared import limits, wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, make_socket
from ami_shared.records import Record, RecordBatch


class ExperienceSender(threading.Thread):
    """Publishes a body's records."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        body: str,
        incarnation: str,
        retained_batches: int = 0,
    ) -> None:
        """Args:
        retained_batches: how many of the last batches can be sent again.
        """
        super().__init__(name="experience", daemon=True)
        self._body, self._incarnation = body, incarnation
        self._queue: deque[Record] = deque(maxlen=limits.EXPERIENCE_QUEUE)
        self._batcher: Batcher[Record] = Batcher(limits.BATCH_RECORDS, limits.BATCH_AGE)
        self._next_sequence = 0
        self._wake = threading.Event()
        self._ending = self._flushing = False
        self._retained: deque[list[Record]] = deque(maxlen=retained_batches)
        self._again: list[list[Record]] = []
        self._socket = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.EXPERIENCE_IN), options=EXPERIENCE)
        self.published = 0
        self.bytes_sent = 0
        self.overflowed = 0

    def put(self, record: Record) -> None:
        """Queue a record for the wire; never blocks."""
        self.overflowed += len(self._queue) == self._queue.maxlen
        self._queue.append(record)
        self._wake.set()

    def flush(self) -> None:
        """Let everything queued so far be sent at once."""
        self._flushing = True
        self._wake.set()

    def send_again(self, count: int) -> None:
        """Let the newest `count` records be sent once more, as far as they are retained; receivers drop duplicates."""
        first = self.published - count
        newest = list(takewhile(lambda batch: batch[-1].sequence >= first, reversed(list(self._retained))))
        self._again = newest[::-1]
        self._wake.set()

    def close(self) -> None:
        """Send what is queued and end the thread."""
        self._ending = True
        self._wake.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        while not self._ending:
            self._wake.wait(self._batcher.due_in(time.monotonic()))
            self._wake.clear()
            self._drain()
        self._drain()
        if last := self._batcher.flush():
            self._publish(last)
        self._socket.close(linger=500)

    def _drain(self) -> None:
        now = time.monotonic()
        flushing, self._flushing = self._flushing, False
        again, self._again = self._again, []
        for retained in again:
            self._send(retained)
        while self._queue:
            record = self._queue.popleft()
            if record.sequence != self._next_sequence and (batch := self._batcher.flush()):
                self._publish(batch)  # the queue overflowed: a batch holds consecutive records only
            self._next_sequence = record.sequence + 1
            if batch := self._batcher.add(record, now):
                self._publish(batch)
        if batch := self._batcher.flush() if flushing else self._batcher.take_aged(now):
            self._publish(batch)

    def _publish(self, records: list[Record]) -> None:
        self._retained.append(records)
        self.published = records[-1].sequence + 1
        self._send(records)

    def _send(self, records: list[Record]) -> None:
        frames = wire.encode(RecordBatch.stack(self._body, self._incarnation, records).to_message())
        self._socket.send_multipart(frames)
        self.bytes_sent += sum(len(frame) for frame in frames)
