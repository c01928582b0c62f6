"""Requests to the controller: ids, deadlines, and errors that name whoever did not answer."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from types import TracebackType
from typing import Any

import zmq

from ami_controller.answers import DENIED
from ami_shared import wire
from ami_shared.bus import HubAddress, Port, dial
from ami_shared.errors import AmiError, DeadlineError, JoinRefusedError, NoControllerError, WireError
from ami_shared.links import LinkWatch
from ami_shared.wire import Message

ANSWER_S = 3.0
LONGEST_POLL_MS = 200  # on Windows Ctrl-C has to wait for its end


class CommandFailedError(AmiError):
    """The controller answered that it could not carry out the command."""


class Client:
    """A connection to the controller; use as a context manager."""

    def __init__(self, hub: HubAddress) -> None:
        self.hub = hub
        self._incarnation = secrets.token_hex(8)
        self._requests = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = LinkWatch()
        self._socket = dial(self._context, zmq.DEALER, hub, Port.CONTROL, watch=self._link)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()
        self._context.destroy(linger=0)

    def status(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Return the system's status; raise NoControllerError if no controller answers."""
        request = self._send("status", {})
        answer = self._receive(request, ("result",), timeout_s)
        if answer is None:
            raise self._nobody(timeout_s)
        return answer.get("status", dict)

    def command(self, kind: str, timeout_s: float) -> dict[str, Any]:
        """Pause, resume or shut down the system; return when every service has confirmed.

        Raises:
            NoControllerError: no controller took the command, or it was restarted before it was done.
            DeadlineError: some services did not confirm in time; names them.
        """
        begin = time.monotonic()
        request = self._send(kind, {"timeout_s": timeout_s, "given": self._clock()})
        answer = self._receive(request, ("accepted", "result"), ANSWER_S)
        if answer is None:
            raise self._nobody(ANSWER_S)
        if answer.kind == "accepted":
            answer = self._wait_for_result(kind, request, begin, timeout_s + 1.0)
        if answer is None:
            raise DeadlineError(f"{kind}: the controller at {self.hub} stopped answering before it was done")
        if not answer.get("ok", bool):
            lost = set(answer.get("gone", list))
            silent = [name for name in answer.get("unconfirmed", list) if name not in lost]
            told = [f"no confirmation within {timeout_s:g} s from {', '.join(silent)}"] if silent else []
            later = "if it still runs, end it there" if kind == "shutdown" else "it will be told when it is back"
            told += [f"{', '.join(sorted(lost))} cannot be reached: {later}"] if lost else []
            told += [f"NOT saved: {answer.get('unsaved', str)}"] if "unsaved" in answer.fields else []
            raise DeadlineError(f"{kind}: {'; '.join(told)}")
        return dict(answer.fields)

    def _wait_for_result(self, kind: str, request: int, begin: float, timeout_s: float) -> Message | None:
        """Wait while the controller that has accepted the command may still be the one that answers."""
        while (left_s := begin + timeout_s - time.monotonic()) > 0:
            if answer := self._receive(request, ("result",), min(ANSWER_S, left_s)):
                return answer
            lived_s, waited_s = float("inf"), time.monotonic() - begin
            with contextlib.suppress(NoControllerError), Client(self.hub) as other:
                lived_s = other.status()["hub"]["uptime_s"]
            if lived_s < waited_s:
                raise NoControllerError(f"{kind}: the controller was restarted before it was done; repeat it")
        return self._receive(request, ("result",), LONGEST_POLL_MS / 1000)

    def save(self, name: str | None, wait_s: float | None) -> dict[str, Any]:
        """Save the system; return when the save has begun, or, given `wait_s`, when it is done.

        Raises:
            NoControllerError: no controller took the command, or it vanished before the end.
            CommandFailedError: the system could not be saved; says why.
            DeadlineError: the save was not done within `wait_s` seconds; it continues.
        """
        request = self._send("save", {"given": self._clock(), **({} if name is None else {"name": name})})
        answer = self._receive(request, ("accepted", "result"), ANSWER_S)
        if answer is None:
            raise self._nobody(ANSWER_S)
        if answer.kind == "accepted" and wait_s is None:
            return dict(answer.fields)
        if answer.kind == "accepted":
            answer = self._wait_for_save(request, answer.get("checkpoint", str), wait_s or ANSWER_S)
        if not answer.get("ok", bool):
            raise CommandFailedError(f"save: {answer.get('reason', str)}")
        return dict(answer.fields)

    def _wait_for_save(self, request: int, checkpoint: str, wait_s: float) -> Message:
        """Wait for the result while the controller answers and the save is in progress."""
        deadline = time.monotonic() + wait_s
        while (left_s := deadline - time.monotonic()) > 0:
            if answer := self._receive(request, ("result",), min(ANSWER_S, left_s)):
                return answer
            with Client(self.hub) as other:
                told = other.status()["hub"]["checkpoint"]
            if not told["saving"] or told["saving"]["checkpoint"] != checkpoint:
                if answer := self._receive(request, ("result",), ANSWER_S):
                    return answer
                if told["newest"] == checkpoint:
                    raise CommandFailedError(f"save: {checkpoint} is saved, but its result was lost on the way")
                raise CommandFailedError(
                    f"save: the result for {checkpoint} was lost, or the controller was restarted meanwhile: "
                    f"`ami checkpoints` tells whether it was saved"
                )
        raise DeadlineError(f"save: not done within {wait_s:g} s; it continues: see `ami status`")

    def _clock(self) -> float:
        """Return the controller's time, to date a command by: one that arrives much later is not executed."""
        answer = self._receive(self._send("clock", {}), ("result",), ANSWER_S)
        if answer is None:
            raise self._nobody(ANSWER_S)
        return answer.get("clock", float)

    def _send(self, kind: str, fields: dict[str, Any]) -> int:
        request = next(self._requests)
        message = Message(kind, "operator", self._incarnation, {"request": request, **fields})
        try:
            self._socket.send_multipart(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the queue is full: no controller has taken any for long
            raise self._nobody(ANSWER_S) from None
        return request

    def _receive(self, request: int, kinds: tuple[str, ...], timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not self._socket.poll(min(LONGEST_POLL_MS, int(left_s * 1000))):
                continue
            try:
                message = wire.decode(self._socket.recv_multipart())
            except WireError as error:
                raise CommandFailedError(f"what answers at {self.hub} is not an AMI controller: {error}") from None
            if message.kind == DENIED and message.fields.get("request") == request:
                raise CommandFailedError(f"refused by the controller at {self.hub}: {message.get('reason', str)}")
            if message.kind in kinds and message.fields.get("request") == request:
                return message
        return None

    def _nobody(self, timeout_s: float) -> AmiError:
        self._link.drain()
        if self._link.refusal:
            return JoinRefusedError(f"refused at {self.hub}: {self._link.refusal}")
        if self._link.doubt:
            return NoControllerError(f"no controller answers at {self.hub}{self._link.doubt}")
        return NoControllerError(
            f"no controller answers at {self.hub} within {timeout_s:g} s: start one with `ami up`, "
            f"or name another with --hub host:port or AMI_HUB"
        )
