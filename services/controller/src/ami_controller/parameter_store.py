"""The parameter store: the newest snapshot of each model, for bodies that join late or missed one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import zmq

from ami_controller.parameter_files import is_file_name
from ami_shared import limits, settled
from ami_shared.bus import PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.errors import WireError
from ami_shared.receiving import Malformed, receive_all
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)

POLL_MS = 100


class ParameterStore(threading.Thread):
    """Follows the parameter stream and keeps the newest verified snapshot of each model."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], hub: HubAddress, found: Sequence[Message] = ()) -> None:
        """Args:
        found: verified snapshots of an earlier life.
        """
        super().__init__(name="parameter store", daemon=True)
        self._kept = {message.get("model", str): (message.get("version", int), message) for message in found}
        self._ending = threading.Event()
        self._socket = make_socket(
            context,
            zmq.SUB,
            connect=hub.endpoint(Port.PARAMETERS_OUT),
            options=SocketOptions(PARAMETERS.queue, PARAMETERS.max_frame_bytes, b"", (b"",)),
        )
        self.malformed = Malformed(log, "snapshot")

    def versions(self) -> dict[str, int]:
        """Version of each snapshot kept."""
        return {model: version for model, (version, _) in list(self._kept.items())}

    def newer_than(self, model: str, version: int) -> Message | None:
        """Return the snapshot message of a model if it is newer than `version`."""
        kept_version, message = self._kept.get(model, (0, None))
        return message if kept_version > version else None

    def all_newer_than(self, versions: Mapping[str, int]) -> dict[str, tuple[int, Message]]:
        """Return the snapshots that are newer than these versions, by model, with their versions."""
        return {model: kept for model, kept in list(self._kept.items()) if kept[0] > versions.get(model, 0)}

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        while not self._ending.is_set():
            if self._socket.poll(POLL_MS):
                receive_all(self._socket, self._take, self.malformed, at_most=1)
        self._socket.close()

    def _take(self, message: Message) -> None:
        if message.kind == settled.MESSAGE_TYPE:
            return
        snapshot = Snapshot.from_message(message)
        if not is_file_name(snapshot.model):
            raise WireError(f"snapshot of {snapshot.model!r:.80}: a model's name has letters, digits, _ . - only")
        if snapshot.model not in self._kept and len(self._kept) >= limits.MOST_MODELS:
            raise WireError(f"snapshot of {snapshot.model!r:.80}: there are {limits.MOST_MODELS} models already")
        if snapshot.version > self._kept.get(snapshot.model, (0, None))[0]:
            self._kept[snapshot.model] = (snapshot.version, message)

    def statistics(self) -> Mapping[str, int]:
        """Return counters for the status."""
        return {"snapshots_refused": self.malformed.count}
