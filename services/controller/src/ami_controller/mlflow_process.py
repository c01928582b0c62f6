"""MLflow in a separate process: its import and its database hold the interpreter's lock for seconds.

The controller holds an `MLflowProcess`; the child process runs this module, with an `MLflowRun` in it. They exchange
MessagePack over the child's standard input and output, one request at a time. The child ends when its input does,
whatever it is doing: none outlives its controller.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, cast

import msgpack

from ami_controller.mlflow_run import MLflowRun, in_a_line
from ami_shared.priority import set_thread_priority
from ami_shared.process import memory_of, own_group, read_pipe
from ami_shared.uris import without_passwords

END_S = 1.0


class MLflowError(Exception):
    """MLflow, or its process, failed to do what was asked; the message says why, in one line."""


class MLflowProcess:
    """The controller's side, for one thread; only `kill` is thread-safe. Failures are raised as MLflowError.

    Attributes:
        artifacts_dropped: number of files dropped because too many were waiting.
        asking_since: since when an answer has been awaited, if one is.
        begun: whether the run has begun, and nothing has gone wrong since.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_dir: Path | None,
        parameters: Mapping[str, Any],
        run_id: str | None,
        on_begun: Callable[[str], None],
    ) -> None:
        """Remember what to log and where; begin() starts the process.

        Args:
            uri: see MLflowRun, as are the next four.
            experiment: see there.
            artifact_dir: see there.
            parameters: see there.
            run_id: see there.
            on_begun: called with the run's id when it has begun.
        """
        self.uri, self.run_id = without_passwords(uri), run_id
        self._about = {
            "uri": uri,
            "experiment": experiment,
            "artifact_dir": str(artifact_dir) if artifact_dir else None,
            "parameters": {name: str(value) for name, value in parameters.items()},
        }
        self._on_begun = on_begun
        self._artifacts: deque[str] = deque(maxlen=64)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = msgpack.Unpacker()
        self.begun = self._killed = False
        self.artifacts_dropped = 0
        self.asking_since: float | None = None

    def begin(self) -> None:
        """Start the process if necessary, and continue the run or begin a new one; idempotent."""
        process = self._started()
        if not self.begun:
            self._ask(process, "begin", {**self._about, "run_id": self.run_id})
            self.begun = True

    def begin_anew(self) -> None:
        """Let the next begin() check that the run still exists: something went wrong."""
        self.begun = False

    def log_points(self, points: Sequence[tuple[str, float, int, float]]) -> None:
        """Log (name, value, step, seconds since the epoch)."""
        self._ask_begun("log_points", list(points))

    def queue_artifact(self, path: Path) -> None:
        """Queue a file to become an artifact; if too many are waiting, the oldest is dropped."""
        self.artifacts_dropped += len(self._artifacts) == self._artifacts.maxlen
        self._artifacts.append(str(path.resolve()))

    def send_artifacts(self) -> None:
        """Log all queued files."""
        while self._artifacts:
            path = self._artifacts.popleft()
            try:
                self._ask_begun("log_artifact", path)
            except MLflowError:
                self.artifacts_dropped += len(self._artifacts) == self._artifacts.maxlen
                self._artifacts.appendleft(path)
                raise

    def finish(self) -> None:
        """Mark the run, which has begun, as finished for now."""
        self._ask_begun("finish", None)

    def close(self) -> None:
        """End the process, which is idle now."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(END_S)
        self.kill()

    def kill(self) -> None:
        """Kill the process, whatever it is doing: its store applies changes atomically. Thread-safe."""
        self._killed = True
        if self._process is not None:
            _end(self._process)

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process in bytes; 0 without one."""
        process = self._process
        return memory_of(process.pid) if process and process.poll() is None else 0

    def _ask_begun(self, what: str, about: Any) -> None:
        self.begin()
        assert self._process is not None
        self._ask(self._process, what, about)

    def _ask(self, process: subprocess.Popen[bytes], what: str, about: Any) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.asking_since = time.monotonic()
        try:
            process.stdin.write(msgpack.packb((what, about)))
            process.stdin.flush()
            answer = _next(self._answers, cast(BufferedReader, process.stdout))
        except (OSError, ValueError) as error:  # the process is gone, or its pipes are closed
            raise MLflowError(f"its process cannot be asked: {error}") from error
        finally:
            self.asking_since = None
        if answer is None:
            raise MLflowError(f"its process ended with exit code {process.wait()}")
        run_id, trouble = answer
        if run_id and run_id != self.run_id:
            self.run_id = run_id
            self._on_begun(run_id)
        if trouble:
            raise MLflowError(trouble)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if self._killed:
                raise MLflowError("its process was ended")
            if self._process is not None:
                _end(self._process)
            self.begun = False
            self._answers = msgpack.Unpacker()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **own_group()
            )
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process if it lives, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unsent requests no longer matter
            if pipe is not None:
                pipe.close()


def _next(unpacker: msgpack.Unpacker, stream: BufferedReader) -> Any:
    """Return the next message of a stream; None at its end."""
    while True:
        for message in unpacker:
            return message
        if not (some := stream.read1()):
            return None
        unpacker.feed(some)


def serve(questions: int, answers: BufferedWriter) -> None:
    """Answer the requests from a pipe until there are no more. An answer is (the run's id, what went wrong or None)."""
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions, asked), name="questions", daemon=True).start()
    run: MLflowRun | None = None
    while True:
        what, about = asked.get()
        trouble = None
        try:
            if what == "begin":
                run = run or MLflowRun(**about)
                run.begin()
            else:
                assert run is not None, "nothing begins before begin"
                getattr(run, what)(*() if about is None else (about,))
        except Exception as error:  # MLflow raises whatever its store or its HTTP client raises
            trouble = in_a_line(error)
        answers.write(msgpack.packb((run.run_id if run else None, trouble)))
        answers.flush()


def _read(questions: int, asked: queue.SimpleQueue[Any]) -> None:
    """Pass requests on; at their end, end the process, since nobody waits for an answer any more."""
    unpacker = msgpack.Unpacker()
    while some := read_pipe(questions):
        unpacker.feed(some)
        for question in unpacker:
            asked.put(question)
    os._exit(0)


def main() -> None:
    """Serve standard input; MLflow's own output goes to standard error."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the controller decides when this ends
        signal.signal(number, signal.SIG_IGN)
    set_thread_priority("nice")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(0, answers)


if __name__ == "__main__":
    main()
