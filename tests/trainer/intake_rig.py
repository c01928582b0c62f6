"""An intake with a real socket where the hub would be."""

from __future__ import annotations

from typing import Any

import zmq

from ami_shared import wire
from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.errors import WireError
from ami_shared.experience import Fetch
from ami_shared.membership import Identity
from ami_shared.records import RecordBatch
from ami_shared.wire import Message
from ami_trainer.intake import Intake

Context = zmq.Context[zmq.Socket[bytes]]


class Rig:
    """An intake, and what it handed on."""

    def __init__(self, context: Context, hub: HubAddress) -> None:
        self.hub_end = make_socket(context, zmq.XPUB, bind=hub.endpoint(Port.EXPERIENCE_OUT))
        self.taken: list[tuple[list[int], bool]] = []
        self.asked: list[Fetch] = []
        me = Identity("ppo", "trainer")
        self.intake = Intake(context, hub, me, self._consume, history=0, ask=self._ask)
        self.intake.start()

    def wait_subscribed(self) -> None:
        """Wait until the hub's end has heard of all that the intake wants."""
        subscribed = set()
        while len(subscribed) < 4:
            assert self.hub_end.poll(30_000)
            subscribed.add(self.hub_end.recv())
        assert subscribed == {b"\x01experience/", b"\x01places/", b"\x01extent/", b"\x01fetched/ppo/"}

    def _consume(self, batch: RecordBatch, continues: bool) -> None:
        if "observation" not in batch.data:
            raise WireError("no observation")
        numbers = list(range(batch.first_sequence, batch.first_sequence + len(batch)))
        self.taken.append((numbers, continues))

    def _ask(self, message: Message) -> None:
        self.asked.append(Fetch.from_message(message))

    def publish(self, batch: RecordBatch) -> None:
        self.send(batch.to_message())

    def send(self, message: Message) -> None:
        self.hub_end.send_multipart(wire.encode(message))

    def told(self) -> dict[str, Any]:
        return self.intake.statistics()

    def of_streams(self, counter: str) -> dict[str, int]:
        return {body: told[counter] for body, told in self.told()["streams"].items()}
