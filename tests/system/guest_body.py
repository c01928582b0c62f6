"""A body without a world: it publishes some records by the streams' own code, and leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import zmq

from ami_inference.experience import ExperienceSender
from ami_shared.bus import HubAddress
from ami_shared.config import agreement, load_config
from ami_shared.control import ControlLink, Hooks
from ami_shared.experience import FETCH
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.metrics import MetricsQueue
from ami_shared.records import Record
from ami_shared.wire import Message


class GuestBody:
    """One life of it."""

    def __init__(self, overrides: Sequence[str], name: str = "guest") -> None:
        config = load_config(list(overrides))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate, hub = Gate(), HubAddress.parse(config.hub)
        identity = Identity(name, "body", agreement(config), saves=False)
        self._sender = ExperienceSender(self._context, hub, name, identity.incarnation, 1 << 20)
        self._link = ControlLink(self._context, hub, identity, self._gate, MetricsQueue(), Hooks(dict, self._hear))
        self._shape = (3, config.observation.height, config.observation.width)

        self._link.start()
        self._link.wait_joined(20.0)
        self._gate.confirm("running", self._gate.desired)
        self._sender.start()

    def _hear(self, message: Message) -> None:
        if message.kind == FETCH:
            self._sender.fetch(message)

    def publish(self, steps: int) -> None:
        """Publish noise, which the trainers of the noise experiment take."""
        noise = np.random.default_rng()
        for n in range(steps):
            frame = noise.integers(0, 256, self._shape, np.uint8)
            self._sender.put(Record(0, n, time.time(), 0.0, {}, {"observation": frame}))

    def close(self) -> None:
        """Leave."""
        self._sender.close()
        self._link.leave()
        self._context.destroy(linger=500)
