"""The parameter stream's receiving end: a thread that verifies snapshots and offers them to the replicas.

What the stream drops is requested from the controller's parameter store once a heartbeat announces a newer version.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from ami_shared import limits, settled
from ami_shared.bus import HubAddress
from ami_shared.errors import WireError
from ami_shared.links import LinkWatch
from ami_shared.models.replicas import Replicas
from ami_shared.settled import Settled
from ami_shared.snapshot_feed import SnapshotFeed
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)

ASK_AFTER_S = 2.0
ASK_AT_LATEST_S = 10.0
ASK_AGAIN_S, ASK_AGAIN_AT_LATEST_S = 10.0, 120.0


@dataclass(frozen=True)
class _Asked:
    """The last request for a model: the version held then, its time, and how long its answer may take."""

    held: int
    at: float
    patience_s: float


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
        """Connect to the hub; snapshots arrive once the thread is started.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            replicas: filled with the snapshots.
            models: names of the models to follow.
            on_settled: called with the notices of trainers that have learned what they could (lockstep only).
        """
        super().__init__(name="parameters", daemon=True)
        self._replicas = replicas
        self._models = tuple(models)
        self._ending = threading.Event()
        hear = {settled.TOPIC: lambda message: on_settled(Settled.from_message(message))} if on_settled else {}
        self._feed = SnapshotFeed(context, hub, models, self._offer, log, hear)
        self._asked: dict[str, _Asked] = {}
        self._since: dict[tuple[str, int], float] = {}  # model and version held → since when there is a newer one
        self.received = 0

    def missing(self, newest: Mapping[str, int]) -> dict[str, int]:
        """Return model → version held here, of those that the controller has a newer version of."""
        held = self._replicas.newest_versions()
        return {model: held[model] for model in self._models if newest.get(model, 0) > held[model]}

    def questions(self, newest: Mapping[str, int], now: float) -> list[dict[str, Any]]:
        """Return the requests to send to the controller: for what the stream has dropped, not for what is on its way.

        A first version is requested at once; a newer one when nothing of its model has arrived for a while, or much has
        arrived but no complete snapshot: a line too slow for the stream drops parts of every version. An answer may be
        large: until it should have arrived, nothing else is requested, whatever newer versions there are.
        """
        missing = self.missing(newest)
        self._since = {key: self._since.get(key, now) for key in missing.items()}
        due = [model for model, held in missing.items() if self._is_due(model, held, now)]
        for model in due:
            asked = self._asked.get(model)
            in_vain = asked is not None and asked.held == missing[model]
            patience_s = min(2 * asked.patience_s, ASK_AGAIN_AT_LATEST_S) if asked and in_vain else ASK_AGAIN_S
            self._asked[model] = _Asked(missing[model], now, patience_s)
        return [{"model": model, "newer_than": missing[model]} for model in due]

    def _is_due(self, model: str, held: int, now: float) -> bool:
        asked = self._asked.get(model)
        if asked and now - asked.at < asked.patience_s:
            return False
        missing_s = now - self._since[model, held]
        quiet_s = min(missing_s, now - self._feed.moved_at(model))
        return quiet_s >= ASK_AFTER_S or missing_s >= ASK_AT_LATEST_S or (held == 0 and asked is None)

    def take(self, message: Message) -> None:
        """Verify one snapshot message and offer it; what does not fit is counted and logged."""
        try:
            self._offer(Snapshot.from_message(message))
        except WireError as error:
            self._feed.malformed.dropped(error, message.sender)

    def _offer(self, snapshot: Snapshot) -> None:
        self.received += self._replicas.offer(snapshot)

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        while not self._ending.is_set():
            self._feed.serve_once()
        self._feed.close()

    @property
    def link(self) -> LinkWatch:
        """The events of the connection to the hub."""
        return self._feed.link

    def statistics(self) -> dict[str, int]:
        """Return what `ami status` shows of the stream at this end."""
        told = self._feed.statistics()
        told["snapshots_passed_over"] += self._replicas.outdated
        return {"snapshots_received": self.received, **told}
