"""The control link: the thread that owns a service's socket to the controller's router.

What to say and when is decided by Membership; here are the socket, the outbox and the health file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, SocketOptions, Waker, dial
from ami_shared.clock import Every
from ami_shared.errors import DeadlineError, WireError
from ami_shared.gate import Gate
from ami_shared.health import HealthFile, health_path
from ami_shared.hub_clock import HubClock
from ami_shared.links import LinkWatch
from ami_shared.membership import Identity, Membership
from ami_shared.metrics import Curves, MetricsQueue
from ami_shared.receiving import Malformed, receive_all
from ami_shared.wire import Message

log = logging.getLogger(__name__)

ALONE_S = 15.0  # a controller that is busy saving answers earlier, and one that is restarted too

Statistics = Mapping[str, Any]


@dataclass
class Hooks:
    """The callbacks of a service's control link; called in the link's thread.

    Attributes:
        statistics: called at every heartbeat; returns what `ami status` shows of this service.
        on_message: called with every message that is not about membership, e.g. a snapshot.
        on_versions: called with the newest version of each model that the controller keeps.
        loop_moved_at: returns when the service's loop last made progress, by the monotonic clock.
    """

    statistics: Callable[[], Statistics] = dict
    on_message: Callable[[Message], None] = lambda message: None
    on_versions: Callable[[Mapping[str, int]], None] = lambda versions: None
    loop_moved_at: Callable[[], float] = time.monotonic


class ControlLink(threading.Thread):
    """Keeps a service a member of the system for as long as it runs."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        identity: Identity,
        gate: Gate,
        metrics: MetricsQueue,
        hooks: Hooks,
        clock: HubClock | None = None,
    ) -> None:
        """Connect to the hub; the service joins once the thread is started.

        Args:
            context: ZeroMQ context of the socket.
            hub: the controller's address.
            identity: who this service is.
            gate: receives what the controller wants of this service.
            metrics: the queue of metrics to send.
            hooks: the service's callbacks.
            clock: is kept set to the hub's time.
        """
        super().__init__(name="control", daemon=True)
        self.identity = identity
        self._hub, self._gate, self._metrics, self._hooks = hub, gate, metrics, hooks
        self._health = HealthFile(health_path(hub.port, identity.role, identity.name))
        self._clock = clock or HubClock()
        self._membership = Membership(identity, gate.wish, self._clock)
        self._outbox: deque[Message] = deque(maxlen=limits.CONTROL_QUEUE)
        self._waker = Waker()
        self.malformed = Malformed(log, "message")
        self.losses = self.unsaid = 0
        self._waits = False  # whether a report waits for the link
        self._curves = Curves()
        self._abandoned_at = float("inf")
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self.link = LinkWatch()
        options = SocketOptions(max_frame_bytes=limits.MAX_SNAPSHOT_FRAME_BYTES, routing_id=identity.routing_id)
        self._socket = dial(context, zmq.DEALER, hub, Port.CONTROL, options, self.link)
        gate.on_change = self._report_now

    @property
    def linked(self) -> bool:
        """Whether the controller has answered lately."""
        return self._membership.linked(time.monotonic())

    @property
    def refused(self) -> bool:
        """Whether the controller has refused this service."""
        return self._membership.refusal is not None

    @property
    def versions(self) -> Mapping[str, int]:
        """The newest version of each model that the controller keeps, as last heard."""
        return self._membership.versions

    @property
    def version_floors(self) -> Mapping[str, int]:
        """The largest version of each model that the system ever knew: new ones must be larger."""
        return self._membership.version_floors

    @property
    def checkpoint(self) -> Mapping[str, Any]:
        """The earlier state of this service that the controller has: {checkpoint, files}; empty = none."""
        return self._membership.checkpoint

    def send(self, message: Message) -> None:
        """Send a message soon; never blocks. Safe from any thread."""
        self.unsaid += len(self._outbox) == self._outbox.maxlen
        self._outbox.append(message)
        self._waker.wake()

    def wait_joined(self, timeout_s: float = float("inf")) -> bool:
        """Block until the controller has accepted this service; False if the gate was closed first.

        Raises:
            JoinRefusedError: the controller does not accept it.
            DeadlineError: it did not answer in time.
        """
        begin = time.monotonic()
        said = Every(15.0, first_after_s=3.0, now=begin)
        while not self._gate.stopping:
            self.raise_if_refused()
            if self._membership.joined:
                return True
            now = time.monotonic()
            if now - begin > timeout_s:
                raise DeadlineError(f"no controller answered at {self._hub} within {timeout_s:g} s")
            if said.due(now):
                log.info("waiting for the controller at %s%s", self._hub, self.link.doubt)
            with self._changed:
                self._changed.wait(0.1)
        return False

    def raise_if_refused(self) -> None:
        """Raise the JoinRefusedError with which the controller turned this service away, if it did."""
        if self._membership.refusal:
            raise self._membership.refusal

    def end_with_controller(self) -> None:
        """Close the gate once the controller has not answered for ALONE_S: nobody would end this service later."""
        self._abandoned_at = time.monotonic()

    def leave(self) -> None:
        """Say goodbye and end the thread."""
        self._ending.set()
        self._waker.wake()
        self.join(timeout=limits.CLOSING)

    def _report_now(self) -> None:
        self._membership.hurry()
        self._waker.wake()

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        health = Every(1.0, first_after_s=0.0)
        was_linked = False
        while not self._ending.is_set():
            now = time.monotonic()
            self._send_due(now)
            if health.due(now):
                self._health.write(self._gate.condition.state, now - self._hooks.loop_moved_at(), self.linked)
            was_linked = self._tell_link_changes(was_linked)
            if now - max(self._abandoned_at, self._membership.last_answer) > ALONE_S:
                self._gate.stop()
            self._look_for_refusal()
            wait_s = min(max(self._membership.next_send() - now, 0.0), limits.SERVICE_HEARTBEAT)
            poller.poll(int(wait_s * 1000))
            self._waker.clear()
            receive_all(self._socket, self._dispatch, self.malformed)
        self._say_goodbye()

    def _send_due(self, now: float) -> None:
        if message := self._membership.poll(now, self._gate.condition, self._tell_statistics):
            if self.link.up or not self._waits:  # one report waits for the link, no more: the others would be old
                self._transmit(message)
            self._waits = not self.link.up
            self._send_metrics()
        while self._outbox:
            self._transmit(self._outbox.popleft())

    def _send_metrics(self) -> None:
        """Send metrics; they wait in their bounded queue for as long as the controller does not answer."""
        if not self.linked:
            return
        points, picture = self._metrics.take(), self._metrics.take_picture()
        if points:
            self._transmit(self.identity.message("metrics", {"points": [list(point) for point in points]}))
        if picture:
            about = {"name": picture.name, "step": picture.step}
            me = self.identity
            self._transmit(Message("picture", me.name, me.incarnation, about, {"pixels": picture.pixels}))

    def _transmit(self, message: Message) -> None:
        try:
            frames = wire.encode(message)
            if (longest := max(map(len, frames))) > limits.MAX_CONTROL_FRAME_BYTES:
                raise WireError(f"{message.kind}: {longest} bytes in one frame, limit {limits.MAX_CONTROL_FRAME_BYTES}")
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.unsaid += 1
            log.debug("control queue full, %s dropped", message.kind)
        except WireError as error:
            self.malformed.dropped(error)

    def _dispatch(self, message: Message) -> None:
        if not self._membership.handle(message, time.monotonic()):
            self._hooks.on_message(message)
            return
        if self._membership.joined:
            self._hooks.on_versions(self._membership.versions)
        if self._membership.refusal:
            self._gate.stop()
        with self._changed:
            self._changed.notify_all()

    def _look_for_refusal(self) -> None:
        """Give up if the hub does not admit this service's key: it will not do so later."""
        self.link.drain()
        if self.link.refusal and not self.refused:
            self._membership.refuse(f"the hub at {self._hub} refuses this service: {self.link.refusal}")
            self._gate.stop()

    def _tell_statistics(self) -> Statistics:
        """Return the statistics for the next report; at intervals they go into the learning record as well."""
        told = {
            **self._hooks.statistics(),
            "clock": self._clock.statistics(),
            "wire_errors": self.malformed.count,
            "metrics_dropped": self._metrics.dropped,
            "messages_dropped": self.unsaid,
            "loop_age_s": max(0.0, time.monotonic() - self._hooks.loop_moved_at()),
        }
        if self._membership.joined and self._curves.due(time.monotonic()):
            step = int(told.get("steps", told.get("updates", 0)))
            self._metrics.put(step, self._curves.changed(told))
        return told

    def _tell_link_changes(self, was_linked: bool) -> bool:
        linked = self.linked
        if was_linked and not linked:
            self.losses += 1
            log.warning("the controller at %s does not answer: continuing without it, reconnecting", self._hub)
        if linked and not was_linked and self.losses:
            log.info("the controller answers again")
        return linked

    def _say_goodbye(self) -> None:
        self._health.remove()
        if not self.refused:
            self._send_metrics()
            self._transmit(self.identity.message("leave"))
        self.link.close()
        self._socket.close(linger=500)
        self._waker.close()
