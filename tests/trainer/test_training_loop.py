from __future__ import annotations

import threading
import time
from collections.abc import Callable

from learning import batch_of, tiny_trainer

from ami_shared.clock import SystemClock
from ami_shared.gate import Desired, Gate
from ami_trainer.training import Training


class Running:
    """A training loop in a thread."""

    def __init__(self, updates_per_record: float = 1_000.0) -> None:
        self.trainer = tiny_trainer(updates_per_record=updates_per_record, burst=10_000)
        self.gate, self.due = Gate(), True
        self.published: list[int] = []  # after how many steps
        self.loop = Training(
            self.trainer, self.gate, SystemClock(), self._publish, lambda *_: None, lambda _: None, 1e9, 1.0
        )
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def _publish(self, now: float) -> bool:
        if self.due:
            self.published.append(self.loop.updates)
        return self.due

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.stop()
        self.thread.join(30.0)
        assert not self.thread.is_alive()


def poll(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def test_it_publishes_at_once_and_trains_when_data_comes() -> None:
    with Running() as running:
        poll(lambda: running.published == [0])
        assert running.loop.updates == 0
        running.trainer.consume(batch_of(8), continues=True)
        running.loop.new_data()
        poll(lambda: running.loop.updates > 3)
        assert running.gate.condition.state == "running"


def test_the_last_steps_of_a_burst_are_published_without_another_burst() -> None:
    with Running(updates_per_record=1.0) as running:
        poll(lambda: running.published)
        running.due = False
        running.trainer.consume(batch_of(8), continues=True)
        running.loop.new_data()
        poll(lambda: running.loop.updates == 8 and not running.trainer.is_trainable())
        time.sleep(0.6)
        assert running.published == [0], "it was not due"
        running.due = True
        poll(lambda: running.published == [0, 8])
        time.sleep(1.2)
        assert running.published == [0, 8], "nothing new is nothing to publish"


def test_not_one_gradient_step_happens_between_pause_and_resume() -> None:
    with Running() as running:
        running.trainer.consume(batch_of(8), continues=True)
        running.loop.new_data()
        poll(lambda: running.loop.updates > 3)
        running.gate.wish(Desired(paused=True, epoch=1))
        poll(lambda: running.gate.condition.state == "paused" and running.gate.condition.epoch == 1)
        updates = running.trainer.updates
        running.trainer.consume(batch_of(8), continues=True)
        running.loop.new_data()
        time.sleep(0.3)
        assert running.trainer.updates == updates
        running.gate.wish(Desired(paused=False, epoch=2))
        poll(lambda: running.trainer.updates > updates)


def test_it_stops_in_the_middle_of_a_burst() -> None:
    with Running() as running:
        running.trainer.consume(batch_of(8), continues=True)
        running.loop.new_data()
        poll(lambda: running.loop.updates > 3)
        running.gate.stop()
        running.thread.join(30.0)
        assert not running.thread.is_alive()
        assert running.loop.updates < 5_000


def test_a_paused_start_does_nothing_until_resume() -> None:
    running = Running()
    running.gate.wish(Desired(paused=True, epoch=1))
    running.trainer.consume(batch_of(8), continues=True)
    with running:
        poll(lambda: running.gate.condition.state == "paused")
        time.sleep(0.1)
        assert running.trainer.updates == 0
