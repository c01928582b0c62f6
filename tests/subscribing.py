"""Waits of tests for subscriptions, which ZeroMQ carries out whenever it comes to it."""

from __future__ import annotations

import time

import zmq


def wait_subscribed(subscriber: zmq.Socket[bytes], publisher: zmq.Socket[bytes], timeout_s: float = 10.0) -> None:
    """Wait until a publisher's socket (XPUB, of no thread yet) has heard of the subscriber."""
    deadline = time.monotonic() + timeout_s
    while not publisher.poll(10):
        subscriber.poll(10)  # lets it answer the new connection with its subscription
        assert time.monotonic() < deadline, "nobody has subscribed"
