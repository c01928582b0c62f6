"""The learning record: one MLflow run for the whole system, and a copy as JSON Lines.

Two threads write in batches from bounded queues, so that recording never blocks. While MLflow does not answer, the JSON
Lines continue, and MLflow gets the queued points when it is back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ami_controller.mlflow_process import MLflowProcess
from ami_controller.mlflow_run import in_a_line
from ami_shared import limits
from ami_shared.metrics import Picture
from ami_shared.wire import Array

log = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 60.0
CLOSE_S = 1.5
BATCH = 1_000
LOOK_BACK_BYTES = 4096
KEPT_PICTURES = 720  # per name: a day, with one every two minutes; MLflow has them all
LONG_S = 60.0  # without an answer from MLflow: that is reported


@dataclass(frozen=True)
class Point:
    """One value of one metric: `name` is service/metric, time in seconds since the epoch."""

    name: str
    value: float
    step: int
    time: float


class Tracker(threading.Thread):
    """Writes what services report."""

    def __init__(self, run_dir: Path, run: MLflowProcess | None, write_interval_s: float) -> None:
        """Prepare the threads; they write once started.

        Args:
            run_dir: where the JSON Lines and pictures go.
            run: MLflow's side; None = JSON Lines only.
            write_interval_s: seconds between two batches.
        """
        super().__init__(name="tracker", daemon=True)
        self._run_dir, self._run, self._interval_s = run_dir, run, write_interval_s
        self._to_file: deque[Point] = deque(maxlen=limits.METRICS_QUEUE)
        self._to_mlflow: deque[Point] = deque(maxlen=limits.METRICS_QUEUE)
        self._images: deque[Picture] = deque(maxlen=16)
        self._ending = threading.Event()
        self._given_up = False
        self._retry_s = FIRST_RETRY_S
        self._retry_at = self._pictures_at = 0.0
        self._to_run = threading.Thread(target=self._write_on_to_mlflow, name="mlflow", daemon=True)
        self.dropped = self.written = self.not_finite = 0
        self._troubles: dict[str, str] = {}

    def put_points(self, service: str, points: Sequence[tuple[str, float, int, float]]) -> None:
        """Queue points of one service: (name, value, step, time); never blocks."""
        for name, value, step, when in points:
            point = Point(f"{service}/{name}", value, step, when)
            for queue in (self._to_file, self._to_mlflow):
                self.dropped += len(queue) == queue.maxlen
                queue.append(point)

    def put_picture(self, service: str, name: str, step: int, pixels: Array) -> None:
        """Queue a picture; never blocks."""
        self.dropped += len(self._images) == self._images.maxlen
        self._images.append(Picture(re.sub(r"[^\w.-]", "_", f"{service}-{name}", flags=re.ASCII)[:100], step, pixels))

    def close(self) -> None:
        """Write what is queued, mark the MLflow run as finished, and end the thread and MLflow's process."""
        self._ending.set()
        deadline = time.monotonic() + CLOSE_S
        self.join(timeout=CLOSE_S)
        if self._to_run.is_alive():
            self._to_run.join(timeout=max(0.0, deadline - time.monotonic()))
        if self._run and self._to_run.is_alive():
            log.warning("MLflow has not taken its last points in time: they are in the run's metrics.jsonl")
            self._given_up = True
            self._run.kill()

    def run(self) -> None:
        if self._run:
            self._to_run.start()
        while not self._ending.wait(self._interval_s):
            self._write_files()
        self._write_files()

    def _write_on_to_mlflow(self) -> None:
        assert self._run is not None
        while not self._ending.wait(self._interval_s):
            self._write_to_mlflow_if_due(time.monotonic())
        self.join(CLOSE_S / 2)  # until its last picture is written
        self._guarded(self._write_mlflow)
        self._send_pictures(math.inf)
        if self._run.begun:
            self._guarded(self._run.finish)
        self._run.close()

    def _write_to_mlflow_if_due(self, now: float) -> None:
        if now >= self._retry_at:
            self._guarded(self._write_mlflow)
        if now >= self._retry_at:
            self._send_pictures(now)

    def _write_files(self) -> None:
        try:
            self._write_file()
            self._write_images()
        except OSError as error:
            self._complain("files", f"{self._run_dir} cannot be written to ({error}); trying again")
        else:
            self._recover("files")

    def _write_file(self) -> None:
        points = [self._to_file[i] for i in range(len(self._to_file))]
        if not points:
            return
        append_lines(self._run_dir / "metrics.jsonl", "".join(_line(point) for point in points).encode())
        _forget(self._to_file, len(points))

    def _write_images(self) -> None:
        from PIL import Image as Pillow

        folder = self._run_dir / "pictures"
        while self._images:
            image = self._images[0]
            path = folder / f"{image.name}-{image.step:08d}.png"
            folder.mkdir(exist_ok=True)
            try:
                Pillow.fromarray(image.pixels).save(path)
            except OSError:
                raise  # a full disk: the picture waits
            except Exception as error:  # a picture that cannot be drawn must not block the others
                self.dropped += 1
                log.warning("picture %s of step %d cannot be drawn: %s", image.name, image.step, error)
            else:
                if self._run:
                    self._run.queue_artifact(path)
            self._images.popleft()
            _forget_old_pictures(folder, image.name, path)

    def _write_mlflow(self) -> None:
        assert self._run is not None
        self._run.begin()
        while self._to_mlflow:
            batch = [self._to_mlflow[i] for i in range(min(BATCH, len(self._to_mlflow)))]
            finite = [point for point in batch if math.isfinite(point.value)]
            self._run.log_points([(p.name, p.value, p.step, p.time) for p in finite])
            self.not_finite += len(batch) - len(finite)
            self.written += len(finite)
            _forget(self._to_mlflow, len(batch))

    def _send_pictures(self, now: float) -> None:
        """Send the queued pictures to MLflow, whose store of them may fail while it takes metrics."""
        assert self._run is not None
        if now < self._pictures_at:
            return
        try:
            self._run.send_artifacts()
        except Exception as error:  # MLflow raises whatever its store or its HTTP client raises
            if not self._given_up:
                told = f"MLflow does not take pictures ({in_a_line(error)}): they are in {self._run_dir / 'pictures'}"
                self._complain("pictures", told)
                self._pictures_at = now + LONGEST_RETRY_S
        else:
            self._recover("pictures")

    def _guarded(self, write: Any) -> None:
        """Run one of MLflow's calls; if it fails, say so once and retry later."""
        assert self._run is not None
        try:
            write()
        except Exception as error:  # MLflow raises whatever its store or its HTTP client raises
            if self._given_up:
                return
            self._run.begin_anew()
            told = f"MLflow does not take metrics ({in_a_line(error)}); the run's metrics.jsonl still gets them"
            self._complain("mlflow", told)
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
            return
        self._recover("mlflow")
        self._retry_s = FIRST_RETRY_S

    @property
    def trouble(self) -> str | None:
        """What does not work at present, in one line; None if all is well."""
        troubles = list(self._troubles.values())
        since = self._run.asking_since if self._run else None
        if since is not None and (silent_s := time.monotonic() - since) > LONG_S:
            troubles.append(
                f"MLflow has not answered for {silent_s:.0f} s; the run's metrics.jsonl still gets the metrics"
            )
        return "; ".join(troubles) or None

    def _complain(self, about: str, trouble: str) -> None:
        if about not in self._troubles:
            log.warning("%s", trouble)
        self._troubles[about] = trouble

    def _recover(self, about: str) -> None:
        if self._troubles.pop(about, None):
            log.info("the learning record is written again")

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the record."""
        return {
            "state": "trouble" if self.trouble else "writing",
            "trouble": self.trouble,
            "queued": len(self._to_mlflow),
            "written": self.written,
            "dropped": self.dropped + (self._run.artifacts_dropped if self._run else 0),
            "not_finite": self.not_finite,
            "mlflow_run": self._run.run_id if self._run else None,
            "uri": self._run.uri if self._run else None,
            "memory_bytes": self._run.memory_bytes if self._run else 0,
        }


def append_lines(path: Path, lines: bytes) -> None:
    """Append complete lines to a file, or none of them; an incomplete last line is removed.

    Raises:
        OSError: the disk is full, or the file cannot be written to.
    """
    with path.open("a+b", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: IO[bytes]) -> int:
    """Return a file's length in bytes without an incomplete last line."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        begin = max(0, end - LOOK_BACK_BYTES)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _forget_old_pictures(folder: Path, name: str, newest: Path) -> None:
    """Remove the oldest pictures of a name, by age: steps do not tell, since a run may be taken back."""
    mine, now = re.compile(re.escape(name) + r"-\d+\.png"), time.time()
    made: dict[Path, float] = {}
    for path in folder.iterdir():
        if path != newest and mine.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it is gone by now
                made[path] = path.stat().st_mtime
    for path in sorted(made, key=lambda path: made[path] if made[path] <= now else 0.0)[: 1 - KEPT_PICTURES]:
        with contextlib.suppress(OSError):  # on Windows, another program has it open
            path.unlink()


def _line(point: Point) -> str:
    value = point.value if math.isfinite(point.value) else str(point.value)
    return json.dumps({"time": point.time, "name": point.name, "step": point.step, "value": value}) + "\n"


def _forget(queue: deque[Point], count: int) -> None:
    """Remove points that have been written, unless the queue's bound has already removed them."""
    for _ in range(min(count, len(queue))):
        queue.popleft()
