"""The parameter stream's receiving end: a thread that verifies snapshots and offers them to the replicas.

What the stream drops is asked of the controller's parameter store, as soon as a heartbeat tells of a newer version.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from ami_shared import settled
from ami_shared.bus import HubAddress
from ami_shared.errors import WireError
from ami_shared.links import LinkWatch
from ami_shared.models.replicas import Replicas
from ami_shared.settled import Settled
from ami_shared.snapshot_feed import SnapshotFeed
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)

ASK_AGAIN_S = 10.0


class ParameterReceiver(threading.Thread):
    """Follows the snapshots of some models."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        replicas: Replicas,
        models: Sequence[str],
        on_settled: Callable[[Settled], None] | None = None,
    ) -> None:
        """Args:
        on_settled: told the notices of trainers that have learned what they could, where somebody waits for them.
        """
        super().__init__(name="parameters", daemon=True)
        self._replicas = replicas
        self._models = tuple(models)
        self._ending = threading.Event()
        hear = {settled.TOPIC: lambda message: on_settled(Settled.from_message(message))} if on_settled else {}
        self._feed = SnapshotFeed(context, hub, models, self._offer, log, hear)
        self._asked_at: dict[tuple[str, int], float] = {}
        self.received = 0

    def missing(self, newest: Mapping[str, int]) -> dict[str, int]:
        """Return the models of which the controller has a newer version, with the version held here."""
        held = self._replicas.newest_versions()
        return {model: held[model] for model in self._models if newest.get(model, 0) > held[model]}

    def questions(self, newest: Mapping[str, int], now: float) -> list[dict[str, Any]]:
        """Return what to ask the controller for: what the stream dropped; large answers take time, so not too often."""
        missing = self.missing(newest)
        due = [m for m in missing if now - self._asked_at.get((m, newest[m]), -ASK_AGAIN_S) >= ASK_AGAIN_S]
        self._asked_at |= {(model, newest[model]): now for model in due}
        self._asked_at = {key: at for key, at in self._asked_at.items() if now - at < ASK_AGAIN_S}
        return [{"model": model, "newer_than": missing[model]} for model in due]

    def take(self, message: Message) -> None:
        """Verify one snapshot message and offer it; what does not fit is counted and said."""
        try:
            self._offer(Snapshot.from_message(message))
        except WireError as error:
            self._feed.malformed.dropped(error, message.sender)

    def _offer(self, snapshot: Snapshot) -> None:
        self.received += self._replicas.offer(snapshot)

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        while not self._ending.is_set():
            self._feed.serve_once()
        self._feed.close()

    @property
    def link(self) -> LinkWatch:
        """What happens on the way to the hub."""
        return self._feed.link

    def statistics(self) -> dict[str, int]:
        """Return what `ami status` shows of the stream at this end."""
        return {"snapshots_received": self.received, **self._feed.statistics()}
