"""The hub's two forwarders: experience from bodies to trainers, parameters from trainers to replicas.

Each is a libzmq proxy in its own thread and context: Python does not see the messages.
"""

from __future__ import annotations

import threading

import zmq

from ami_controller.doorkeeper import Security
from ami_controller.guarded_forwarder import GuardedForwarder
from ami_shared import limits
from ami_shared.bus import EXPERIENCE, PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.links import LinkWatch
from ami_shared.process import usable_cores

IO_THREADS = min(4, usable_cores())  # copy in and out of the kernel, for several connections at once


class Forwarder(threading.Thread):
    """Forwards messages from publishers to subscribers, and subscriptions the other way."""

    def __init__(self, name: str, address: HubAddress, inward: Port, outward: Port, options: SocketOptions) -> None:
        """Bind both ends; raise ConfigurationError if a port is taken."""
        super().__init__(name=name, daemon=True)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        self.links = (LinkWatch(), LinkWatch())
        publishers, subscribers = self.links
        try:
            self._in = make_socket(
                self._context, zmq.XSUB, bind=address.endpoint(inward), options=options, watch=publishers
            )
            self._out = make_socket(
                self._context, zmq.XPUB, bind=address.endpoint(outward), options=options, watch=subscribers
            )
        except Exception:
            self._context.destroy(linger=0)
            raise

    def run(self) -> None:
        try:
            zmq.proxy(self._in, self._out)
        except zmq.ContextTerminated:
            pass
        finally:
            self._in.close()
            self._out.close()

    def drain(self) -> None:
        """Take in the events of the connections."""
        for watch in self.links:
            watch.drain()

    def close(self) -> None:
        """End the thread and free the ports."""
        for watch in self.links:
            watch.close()
        self._context.term()
        self.join(timeout=limits.CLOSING)


def make_guarded_forwarders(
    context: zmq.Context[zmq.Socket[bytes]], address: HubAddress, security: Security
) -> list[GuardedForwarder]:
    """Bind the two forwarders of a hub with keys; they are not yet started."""
    streams = {
        "experience": ((Port.EXPERIENCE_IN, Port.EXPERIENCE_OUT), EXPERIENCE),
        "parameters": ((Port.PARAMETERS_IN, Port.PARAMETERS_OUT), PARAMETERS),
    }
    return [
        GuardedForwarder(name, context, address, ports, options, security) for name, (ports, options) in streams.items()
    ]


def make_forwarders(address: HubAddress) -> list[Forwarder]:
    """Bind the two forwarders of a hub without keys; they are not yet started."""
    first = Forwarder("experience", address, Port.EXPERIENCE_IN, Port.EXPERIENCE_OUT, EXPERIENCE)
    try:
        second = Forwarder("parameters", address, Port.PARAMETERS_IN, Port.PARAMETERS_OUT, PARAMETERS)
    except Exception:
        first.start()
        first.close()
        raise
    return [first, second]
