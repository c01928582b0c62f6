"""The parameter store: the newest snapshot of each model, for bodies that join late or have missed one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import zmq

from ami_controller.answers import NAME
from ami_shared import limits
from ami_shared.bus import HubAddress
from ami_shared.errors import WireError
from ami_shared.names import NAME_RULE, is_name
from ami_shared.snapshot_feed import SnapshotFeed
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)


class ParameterStore(threading.Thread):
    """Follows the parameter stream and keeps the newest verified snapshot of each model."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], hub: HubAddress, found: Sequence[Snapshot] = ()
    ) -> None:
        """Subscribe to the parameter stream.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            found: verified snapshots of an earlier process.
        """
        super().__init__(name="parameter store", daemon=True)
        self._kept = {snapshot.model: snapshot for snapshot in found}
        self._ending = threading.Event()
        self._feed = SnapshotFeed(context, hub, None, self._take, log)

    def versions(self) -> dict[str, int]:
        """Return the version of each snapshot kept."""
        return {model: kept.version for model, kept in list(self._kept.items())}

    def newer_than(self, model: str, version: int) -> Message | None:
        """Return a model's snapshot as a message if it is newer than `version`; as bfloat16 if it arrived so."""
        kept = self._kept.get(model)
        return kept.to_message(NAME, NAME, kept.halved) if kept and kept.version > version else None

    def all_newer_than(self, versions: Mapping[str, int]) -> list[Snapshot]:
        """Return the snapshots that are newer than these versions."""
        return [kept for kept in list(self._kept.values()) if kept.version > versions.get(kept.model, 0)]

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        while not self._ending.is_set():
            self._feed.serve_once()
        self._feed.close()

    def _take(self, snapshot: Snapshot) -> None:
        if not is_name(snapshot.model):
            raise WireError(f"snapshot of {snapshot.model!r:.80}: a model's name has {NAME_RULE}")
        if snapshot.model not in self._kept and len(self._kept) >= limits.MOST_MODELS:
            raise WireError(f"snapshot of {snapshot.model!r:.80}: there are {limits.MOST_MODELS} models already")
        if snapshot.model not in self._kept or snapshot.version > self._kept[snapshot.model].version:
            self._kept[snapshot.model] = snapshot

    def statistics(self) -> Mapping[str, int]:
        """Return counters for the status."""
        return self._feed.statistics()
