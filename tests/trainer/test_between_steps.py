"""What happens between two gradient steps, and in which order: a scripted trainer on a clock that stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import zmq
from torch import nn

from ami_shared import wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.gate import Condition, Desired, Gate
from ami_shared.membership import Identity
from ami_shared.metrics import Picture
from ami_shared.records import RecordBatch
from ami_shared.snapshots import SNAPSHOT_TOPIC, Snapshot
from ami_trainer import training
from ami_trainer.publishing import Model, SnapshotPublisher
from ami_trainer.training import Training
from manual_clock import ManualClock
from subscribing import wait_subscribed

PollFor = Callable[..., Any]


class Script:
    """A trainer that takes `steps` gradient steps in one burst.

    Attributes:
        at: what happens after the n-th.
        metrics: of the n-th, if not its loss alone.
    """

    published_models: Mapping[str, nn.Module] = {}

    def __init__(self, log: list[str], steps: int) -> None:
        self.log, self.left = log, steps
        self.at: dict[int, Callable[[], Any]] = {}
        self.metrics: dict[int, Mapping[str, float]] = {}
        self.taken = 0

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        raise NotImplementedError

    def is_trainable(self) -> bool:
        return self.left > 0

    def train(self) -> Iterator[Mapping[str, float]]:
        while self.left:
            self.left -= 1
            self.taken += 1
            self.log.append(f"step {self.taken}")
            self.at.get(self.taken, lambda: None)()
            yield self.metrics.get(self.taken, {"loss": float(self.taken)})

    def picture(self) -> Picture | None:
        return Picture("view", self.taken, np.zeros((1, 1, 3), np.uint8))

    def statistics(self) -> Mapping[str, Any]:
        return {}


class Run:
    def __init__(self, steps: int = 5) -> None:
        self.log: list[str] = []
        self.metrics: list[tuple[int, Mapping[str, float]]] = []
        self.pictures: list[int] = []
        self.trainer, self.gate, self.clock = Script(self.log, steps), Gate(), ManualClock(100.0)
        self.training = Training(
            self.trainer,
            self.gate,
            self.clock,
            self._publish,
            lambda step, values: self.metrics.append((step, dict(values))),
            lambda picture: self.pictures.append(picture.step),
            picture_interval_s=10.0,
            metrics_interval_s=1.0,
        )

    def _publish(self, now: float) -> bool:
        self.log.append("publish")
        return True

    def run(self) -> Run:
        self.trainer.at.setdefault(self.trainer.left, self.gate.stop)
        self.training.run()
        return self


def test_it_publishes_before_the_first_step_and_after_every_one() -> None:
    assert Run(2).run().log == ["publish", "step 1", "publish", "step 2", "publish"]


def test_a_stop_ends_a_burst_after_the_present_step() -> None:
    run = Run(100)
    run.trainer.at[3] = run.gate.stop
    run.run()
    assert run.training.updates == run.trainer.taken == 3


def test_a_pause_takes_hold_right_after_the_present_step() -> None:
    run = Run(4)
    seen: list[list[str]] = []

    def resume() -> None:
        if run.gate.condition == Condition("paused", 1):
            seen.append(list(run.log))
            run.gate.wish(Desired(epoch=2))

    run.gate.on_change = resume
    run.trainer.at[2] = lambda: run.gate.wish(Desired(paused=True, epoch=1))
    run.run()
    assert seen == [["publish", "step 1", "publish", "step 2", "publish"]]
    assert run.trainer.taken == 4
    assert run.gate.condition == Condition("running", 2)


def test_metrics_are_means_since_the_last_time() -> None:
    run = Run(5)

    def pass_a_second() -> None:
        run.clock.now += 1.0

    run.trainer.at[4] = pass_a_second
    run.trainer.metrics[1] = {"loss": 1.0, "rare": 1.0}
    run.run()
    assert run.metrics == [(1, {"loss": 1.0, "rare": 1.0}), (4, {"loss": 3.0})]


def test_what_is_not_finite_does_not_spoil_a_mean() -> None:
    run = Run(5)

    def pass_a_second() -> None:
        run.clock.now += 1.0

    run.trainer.at[4] = pass_a_second
    run.trainer.metrics[3] = {"loss": float("nan"), "grad_norm": float("inf")}
    run.run()
    assert run.metrics == [(1, {"loss": 1.0}), (4, {"loss": 3.0})]


def test_a_picture_is_made_at_its_interval() -> None:
    run = Run(30)

    def pass_a_second() -> None:
        run.clock.now += 1.0

    run.trainer.at.update(dict.fromkeys(range(1, 30), pass_a_second))
    run.run()
    assert run.pictures == [10, 20]


def test_it_says_when_it_moved_last_also_while_paused() -> None:
    run = Run(1)

    def stop_later() -> None:
        run.clock.now += 50.0
        run.gate.stop()

    run.gate.on_change = lambda: run.gate.condition.state == "paused" and stop_later()
    run.gate.wish(Desired(paused=True, epoch=1))
    run.run()
    assert run.training.moved_at == 150.0
    assert run.trainer.taken == 0


@pytest.fixture
def idle_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Run, threading.Thread]]:
    """A loop that has found nothing to learn, and would wait for a minute."""
    monkeypatch.setattr(training, "IDLE_WAIT_S", 60.0)
    run, idle = Run(0), threading.Event()
    monkeypatch.setattr(run.training.pace, "settle", idle.set)
    thread = threading.Thread(target=run.training.run, daemon=True)
    thread.start()
    assert idle.wait(30.0)
    yield run, thread
    run.gate.stop()
    thread.join(30.0)
    assert not thread.is_alive()


def test_new_data_wakes_an_idle_loop_at_once(idle_loop: tuple[Run, threading.Thread], poll_for: PollFor) -> None:
    run, _ = idle_loop
    assert run.trainer.taken == 0
    run.trainer.left = 1
    run.training.new_data()
    poll_for(lambda: run.trainer.taken == 1)


def test_a_stop_wakes_an_idle_loop_at_once(idle_loop: tuple[Run, threading.Thread]) -> None:
    run, thread = idle_loop
    run.gate.stop()
    thread.join(30.0)
    assert not thread.is_alive()


class EndsWhileSending(SnapshotPublisher):
    """A publisher whose trainer takes one more step, and ends, just while the first snapshot is sent."""

    def _send_bytes(self, model: Model) -> None:
        super()._send_bytes(model)
        if model.last and model.last.snapshot.version == 1:
            self.offer_if_due(2.0)
            self._ending = True


def test_what_was_learned_last_is_sent_before_the_publisher_ends(
    context: zmq.Context[zmq.Socket[bytes]], hub: HubAddress
) -> None:
    options = SocketOptions(100, PARAMETERS.max_frame_bytes, b"", (SNAPSHOT_TOPIC,))
    subscriber = make_socket(context, zmq.SUB, bind=hub.endpoint(Port.PARAMETERS_IN), options=options)
    models = {"model": nn.Linear(3, 3)}
    publisher = EndsWhileSending(context, hub, Identity("trainer", "trainer"), models, 0.0)
    wait_subscribed(subscriber, publisher._socket)
    publisher.start()
    publisher.offer_if_due(1.0)
    publisher.join(30.0)
    assert not publisher.is_alive()
    for version in (1, 2):
        assert subscriber.poll(30_000), f"version {version} never came"
        assert Snapshot.from_message(wire.decode(subscriber.recv_multipart())).version == version
