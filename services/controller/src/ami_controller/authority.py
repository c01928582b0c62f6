"""Who may do what at the hub. Pure: decides by proved keys, never by what a message claims about its sender.

body        publishes experience under its own name, reads parameters
trainer     publishes the models that the configuration gives it, reads experience and parameters
operator    gives commands, and reads
observer    reads
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ami_controller.key_folder import Peer
from ami_shared import limits, settled
from ami_shared.bus import Port
from ami_shared.experience import EXTENT, EXTENT_TOPIC, FETCH, FETCHED, FETCHED_TOPIC, PLACES, PLACES_TOPIC
from ami_shared.records import MESSAGE_TYPE as RECORDS
from ami_shared.records import TOPIC as RECORDS_TOPIC
from ami_shared.snapshots import NOTICE, SNAPSHOT, notice_topic, topic
from ami_shared.wire import Message

CONTROLLER = "controller"  # the role of the controller's own sockets that connect to the hub

_READING = {Port.CONTROL, Port.EXPERIENCE_OUT, Port.PARAMETERS_OUT}
PORTS: Mapping[str, set[Port]] = {
    "body": {Port.CONTROL, Port.EXPERIENCE_IN, Port.PARAMETERS_OUT},
    "trainer": {Port.CONTROL, Port.EXPERIENCE_OUT, Port.PARAMETERS_IN, Port.PARAMETERS_OUT},
    "operator": _READING,
    "observer": _READING,
    CONTROLLER: {Port.PARAMETERS_OUT},
}

READ = {"status", "agreement", "clock", "get_parameters"}
COMMANDED = {"pause", "resume", "shutdown", "save"}
REPORTED = {"join", "heartbeat", "leave", "metrics", "picture", "offer", "unsaved", "part", "get_part", "damaged"}
CONTROL: Mapping[str, set[str]] = {
    "body": READ | REPORTED,
    "trainer": READ | REPORTED | {FETCH},
    "operator": READ | COMMANDED,
    "observer": READ,
}


class Authority:
    """The list of keys, and what it allows."""

    def __init__(self, peers: Iterable[Peer], models_of: Mapping[str, Iterable[str]]) -> None:
        """Start from the current list of keys.

        Args:
            peers: everyone who may connect.
            models_of: trainer → the models that it may publish.
        """
        self._models_of = {trainer: set(models) for trainer, models in models_of.items()}
        self._peers: dict[bytes, Peer] = {}
        self._replace(peers)

    def replace(self, peers: Iterable[Peer]) -> list[Peer]:
        """Take over a changed list; return the peers who may no longer connect."""
        before = self._peers
        self._replace(peers)
        return [peer for key, peer in before.items() if key not in self._peers]

    def _replace(self, peers: Iterable[Peer]) -> None:
        self._peers = {peer.public: peer for peer in peers}

    @property
    def peers(self) -> list[Peer]:
        """Return everyone who may connect."""
        return list(self._peers.values())

    def peer(self, public: bytes) -> Peer | None:
        """Return the owner of a proved key; None if it may not connect."""
        return self._peers.get(public)

    def why_not_in(self, public: bytes, port: Port) -> str | None:
        """Return why the owner of a key may not connect to a port; None if it may."""
        peer = self.peer(public)
        if peer is None:
            return "unknown key"
        if port not in PORTS[peer.role]:
            return f"{peer.role} {peer.name} has no business at port {port.name}"
        return None

    def why_not_said(self, public: bytes, message: Message) -> str | None:
        """Return why a control message from the owner of a key is refused; None if it is accepted."""
        peer = self.peer(public)
        if peer is None:
            return "unknown key"
        if message.kind not in CONTROL.get(peer.role, ()):
            return f"{peer.role} {peer.name} may not say {message.kind!r:.40}"
        if message.kind in READ | COMMANDED:
            return None
        if message.sender != peer.name:
            return f"{peer.role} {peer.name} speaks as {message.sender!r:.80}"
        if message.kind == "join" and message.fields.get("role") != peer.role:
            return f"{peer.role} {peer.name} joins as {message.fields.get('role')!r:.40}"
        return None

    def why_not_published(self, public: bytes, message: Message) -> str | None:
        """Return why a message of a stream is not forwarded; None if it is."""
        peer = self.peer(public)
        if peer is None:
            return "unknown key"
        if message.sender != peer.name:
            return f"{peer.role} {peer.name} publishes as {message.sender!r:.80}"
        allowed = self._published_by_body if peer.role == "body" else self._published_by_trainer
        if not allowed(peer, message):
            return f"{peer.role} {peer.name} may not publish {message.kind!r:.40} under {message.topic!r:.80}"
        return None

    @staticmethod
    def _published_by_body(peer: Peer, message: Message) -> bool:
        if message.topic.startswith(FETCHED_TOPIC):
            return message.kind in (RECORDS, PLACES, FETCHED)
        own = {RECORDS: RECORDS_TOPIC, PLACES: PLACES_TOPIC, EXTENT: EXTENT_TOPIC}.get(message.kind)
        return own is not None and message.topic in (own + peer.name.encode(), own + f"{peer.name}/".encode())

    def _published_by_trainer(self, peer: Peer, message: Message) -> bool:
        if message.kind == settled.MESSAGE_TYPE:
            return message.topic == settled.TOPIC + peer.name.encode()
        model = message.fields.get("model")
        if not isinstance(model, str) or len(model) > limits.MAX_NAME_LENGTH:
            return False
        of_kind = {SNAPSHOT: topic, NOTICE: notice_topic}.get(message.kind)
        own = self._models_of.get(peer.name, ())
        return of_kind is not None and model in own and message.topic == of_kind(model)
