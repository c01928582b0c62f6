"""Where snapshots come from: shared memory if the trainer is on the same host, else the wire.

At first the feed subscribes to both. As soon as a model's notices lead to memory within reach, it unsubscribes from the
model's bytes, and a publisher sends none without a subscriber.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import zmq

from ami_shared import limits
from ami_shared.bus import PARAMETERS, HubAddress, Port, dial
from ami_shared.errors import WireError
from ami_shared.links import LinkWatch
from ami_shared.receiving import Malformed, receive_all
from ami_shared.shared_memory import Reader
from ami_shared.snapshots import NOTICE, NOTICE_TOPIC, SNAPSHOT_TOPIC, Notice, Snapshot, notice_topic, part_of, topic
from ami_shared.wire import Message

POLL_MS = 100
MESSAGES_AT_ONCE = 64


@dataclass
class _Begun:
    """The parts of a snapshot that have arrived so far."""

    version: int
    count: int
    source: tuple[str, str]  # sender and incarnation: another process may publish other parameters of the same version
    parts: dict[int, Snapshot] = field(default_factory=dict)


class SnapshotFeed:
    """The receiving end of the parameter stream. It belongs to one thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        models: Sequence[str] | None,
        take: Callable[[Snapshot], None],
        log: logging.Logger,
        more: dict[bytes, Callable[[Message], None]] | None = None,
    ) -> None:
        """Subscribe to the stream.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            models: names of the models to follow; None = all.
            take: called with every verified snapshot; may raise WireError.
            log: for malformed messages.
            more: further topics, and what to call with their messages.
        """
        self._take, self._more = take, dict(more or {})
        self._reader = Reader()
        self._over_the_wire: dict[str, bool] = {}
        self._begun: dict[str, _Begun] = {}
        self._newest: dict[str, Snapshot] = {}
        self._others: list[Callable[[], None]] = []
        self._all = models is None
        self._using: str | None = None
        self._moved_at: dict[str, float] = dict.fromkeys(models or (), float("-inf"))
        self._asked_for = {SNAPSHOT_TOPIC} if models is None else set(map(topic, models))
        notices = [NOTICE_TOPIC] if models is None else list(map(notice_topic, models))
        self.link = LinkWatch()
        subscriptions = (*notices, *self._asked_for, *self._more)
        options = replace(PARAMETERS, subscriptions=subscriptions)
        self._socket = dial(context, zmq.SUB, hub, Port.PARAMETERS_OUT, options, self.link)
        self.malformed = Malformed(log, "snapshot")
        self._from_memory = self._from_wire = self._passed_over = self._bytes = 0

    def serve_once(self) -> None:
        """Wait a moment for messages; pass on each model's newest snapshot, then all other messages.

        However long it takes to use a snapshot, only what arrives meanwhile waits: the queue of messages stays short.
        Messages that refer to a snapshot are passed on after it.
        """
        if self._socket.poll(POLL_MS):
            receive_all(self._socket, self._dispatch, self.malformed, MESSAGES_AT_ONCE)
        brought = [partial(self._use, snapshot) for snapshot in self._newest.values()] + self._others
        self._newest, self._others = {}, []
        for take in brought:
            try:
                take()
            except WireError as error:
                self.malformed.dropped(error)

    def _use(self, snapshot: Snapshot) -> None:
        self._using = snapshot.model
        try:
            self._take(snapshot)
        finally:
            self._using = None
            self._moved(snapshot.model)

    def _moved(self, model: str) -> None:
        if model in self._moved_at:
            self._moved_at[model] = time.monotonic()

    def moved_at(self, model: str) -> float:
        """Return when something of a followed model last arrived, by the monotonic clock; now, while it is being used.

        Thread-safe.
        """
        return time.monotonic() if self._using == model else self._moved_at.get(model, float("-inf"))

    def close(self) -> None:
        self.link.close()
        self._socket.close()

    def statistics(self) -> dict[str, int]:
        """Return what `ami status` shows of the stream at this end."""
        return {
            "snapshots_from_memory": self._from_memory,
            "snapshots_from_wire": self._from_wire,
            "snapshots_passed_over": self._passed_over,
            "snapshots_refused": self.malformed.count,
            "snapshot_bytes_received": self._bytes,
        }

    def _dispatch(self, message: Message) -> None:
        if message.kind == NOTICE:
            self._look_at(Notice.from_message(message))
            return
        for prefix, take in self._more.items():
            if message.topic.startswith(prefix):
                self._others.append(partial(take, message))
                return
        index, count = part_of(message)
        part = Snapshot.from_message(message, lasting=count > 1)
        self._bytes += sum(array.nbytes for array in message.arrays.values())
        self._moved(part.model)
        if snapshot := self._put_together(part, index, count, (message.sender, message.incarnation)):
            self._from_wire += 1
            self._use_if_newest(snapshot)

    def _put_together(self, part: Snapshot, index: int, count: int, source: tuple[str, str]) -> Snapshot | None:
        """Return the whole snapshot once its last part is here. Parts of a superseded snapshot are dropped."""
        begun = self._begun.get(part.model)
        overtaken = begun is not None and (part.version, source != begun.source) > (begun.version, False)
        if begun is None or overtaken:
            self._passed_over += begun is not None
            if begun is None and len(self._begun) >= limits.MOST_MODELS:
                raise WireError(f"snapshot of {part.model!r:.80}: there are {limits.MOST_MODELS} models already")
            begun = self._begun[part.model] = _Begun(part.version, count, source)
        elif (part.version, count, source) != (begun.version, begun.count, begun.source):
            return None
        begun.parts[index] = part
        if len(begun.parts) < count:
            return None
        del self._begun[part.model]
        arrays = {name: array for i in range(count) for name, array in begun.parts[i].arrays.items()}
        if len(arrays) > limits.MAX_ARRAYS:
            raise WireError(f"snapshot of {part.model!r:.80}: {len(arrays)} arrays, limit {limits.MAX_ARRAYS}")
        return replace(part, arrays=arrays, halved=any(of.halved for of in begun.parts.values()))

    def _look_at(self, notice: Notice) -> None:
        self._moved(notice.model)
        snapshot = notice.snapshot(self._reader)
        self._listen(notice.model, over_the_wire=snapshot is None)
        if snapshot:
            self._from_memory += 1
            self._use_if_newest(snapshot)

    def _use_if_newest(self, snapshot: Snapshot) -> None:
        other = self._newest.get(snapshot.model)
        self._passed_over += other is not None and other.version != snapshot.version
        if other is None or snapshot.version > other.version:
            self._newest[snapshot.model] = snapshot

    def _listen(self, model: str, over_the_wire: bool) -> None:
        """Subscribe to a model's bytes, or unsubscribe."""
        if model not in self._over_the_wire and len(self._over_the_wire) >= limits.MOST_MODELS:
            raise WireError(f"notice of {model!r:.80}: there are {limits.MOST_MODELS} models already")
        self._over_the_wire[model] = over_the_wire
        asked = SNAPSHOT_TOPIC if self._all else topic(model)
        wanted = any(self._over_the_wire.values()) if self._all else over_the_wire
        if wanted and asked not in self._asked_for:
            self._asked_for.add(asked)
            self._socket.subscribe(asked)
        elif not wanted and asked in self._asked_for:
            self._asked_for.discard(asked)
            self._socket.unsubscribe(asked)
