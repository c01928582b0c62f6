"""How fast the experience stream is with all its promises, what publishing costs the acting loop, and catching up.

Every row stands beside yardsticks of the same minute: raw TCP between two Python processes, the same through a third
one that passes on bytes unseen, plain pyzmq PUB/SUB, large messages through libzmq's forwarder, which nobody makes of
records and nobody reads, and portal's calls if it is there.
Ours goes through a real controller: batches, ring, forwarder, frontier, and a copy into a preallocated buffer; between
processes of one host through memory, and over TCP as between machines.

    python benchmarks/streams.py [--records 200000] [--size 25000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import zmq
from ending import end_with_children

from ami_inference.experience import ExperienceSender
from ami_shared import shared_memory
from ami_shared.bus import HubAddress
from ami_shared.config import agreement, hub_of, load_config
from ami_shared.control import ControlLink, Hooks
from ami_shared.experience import FETCH
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.memory import keep_freed_memory
from ami_shared.metrics import MetricsQueue
from ami_shared.records import Record, RecordBatch
from ami_shared.wire import Message
from ami_trainer.intake import Intake

SPAWN = multiprocessing.get_context("spawn")
IN_FLIGHT = 2_000  # records at most, and half the ring: a faster sender would outrun any
RING_BYTES = 256_000_000
BUFFER_BYTES = 51_200_000
LIVE_HZ = 1_000
PORTAL_AT_ONCE = 32  # calls on their way
SLOWER = 10  # than the stream is a slow trainer
STEP_BYTES = 8_000_000
BARE_RECORDS = 16  # a message
RELAY_BYTES = 1 << 18  # that a relay takes and passes on at a time, at most
FEW_BYTES = 2_000_000  # a second: what is sent before it counts, while the controller comes to rest


class Shared:
    """Numbers that body, trainer and benchmark see."""

    def __init__(self) -> None:
        self.taken = SPAWN.Value(ctypes.c_int64, 0)
        self.lost = SPAWN.Value(ctypes.c_int64, 0)
        self.published = SPAWN.Value(ctypes.c_int64, 0)
        self.records = SPAWN.Value(ctypes.c_int64, 0)
        self.rate = SPAWN.Value(ctypes.c_double, 0.0)
        self.go = SPAWN.Event()
        self.end = SPAWN.Event()


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=25_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=5650)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="rows whose names have these words, and raw TCP")
    arguments = parser.parse_args()
    n, size = arguments.records, arguments.size
    print(f"{os.cpu_count()} cores; records of {size} bytes, medians of {arguments.repeats} runs")
    print(f"{'':<34} {'load':>5} {'records/s':>10} {'of raw TCP':>10}")
    rows: dict[str, Callable[[], float]] = {
        "raw TCP": lambda: raw_tcp(n, size),
        "raw TCP through a relay": lambda: raw_tcp(n, size, relayed=True),
        "plain PUB/SUB, one by one": lambda: plain_pubsub(n, size),
        "16 a message, bare forwarder": lambda: bare_forwarder(n, size),
        "portal, one call a record": lambda: portal_calls(n // 20, size, arguments.port + 9),
        "body to buffer, same host": lambda: with_system(arguments, stream_through),
        "body to buffer, TCP": lambda: with_system(arguments, stream_through, False),
        "three trainers, each, same host": lambda: with_system(arguments, to_trainers, 3, True)[0],
        "three trainers, each, TCP": lambda: with_system(arguments, to_trainers, 3, False)[0],
        "catching up beside live, same host": lambda: with_system(arguments, catch_up),
        "catching up beside live, TCP": lambda: with_system(arguments, catch_up, False),
    }
    if arguments.only:
        rows = {name: of for name, of in rows.items() if name == "raw TCP" or any(w in name for w in arguments.only)}
    loads: dict[str, float] = {}
    runs: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.repeats):
        for name, measure in rows.items():
            loads.setdefault(name, os.getloadavg()[0])
            runs[name].append(measure())
    for name, of in runs.items():
        rate, raw = statistics.median(of), statistics.median(runs["raw TCP"])
        print(f"{name:<34} {loads[name]:5.1f} {rate:10.0f} {rate / raw:10.2f}", flush=True)
    if arguments.only:
        return
    print(f"\ncost of publishing to the acting loop at {LIVE_HZ} records a second, ms")
    for near in (True, False):
        for trouble in ("none", "slow", "stopped", "dead"):
            p50, p99, largest = with_system(arguments, publishing_cost, trouble, near)
            where = "same host" if near else "TCP"
            print(f"trainer {where:<9} {trouble:<9} p50 {p50:.4f}  p99 {p99:.4f}  max {largest:.3f}", flush=True)


def raw_tcp(count: int, size: int, relayed: bool = False) -> float:
    """Records a second over one plain connection, or over two with a process between that passes on bytes unseen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if relayed:
            ours, theirs = SPAWN.Pipe()
            relay = SPAWN.Process(target=_relay_raw, args=(port, theirs), daemon=True)
            relay.start()
            port = ours.recv()
        sender = SPAWN.Process(target=_send_raw, args=(port, count, size), daemon=True)
        sender.start()
        peer, _ = server.accept()
        with peer:
            into = memoryview(bytearray(size))
            _receive_raw(peer, into)
            begin = time.perf_counter()
            for _ in range(count):
                _receive_raw(peer, into)
            took = time.perf_counter() - begin
        sender.join()
        if relayed:
            relay.join()
    return count / took


def _relay_raw(onward: int, ready: Connection) -> None:
    into = memoryview(bytearray(RELAY_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as server:
        ready.send(server.getsockname()[1])
        inward, _ = server.accept()
        with inward, socket.create_connection(("127.0.0.1", onward)) as outward:
            while got := inward.recv_into(into):
                outward.sendall(into[:got])


def _send_raw(port: int, count: int, size: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as out:
        data = bytes(size)
        for _ in range(count + 1):
            out.sendall(data)


def _receive_raw(peer: socket.socket, into: memoryview) -> None:
    got = 0
    while got < len(into):
        got += peer.recv_into(into[got:])


def plain_pubsub(count: int, size: int) -> float:
    """Records a second over PUB/SUB without a hub, one by one; the queue is unbounded so that none is dropped."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    heard = context.socket(zmq.SUB)
    heard.set_hwm(0)
    heard.subscribe(b"")
    port = heard.bind_to_random_port("tcp://127.0.0.1")
    sender = SPAWN.Process(target=_publish_plain, args=(port, count, size), daemon=True)
    sender.start()
    heard.recv()
    begin = time.perf_counter()
    for _ in range(count):
        heard.recv()
    took = time.perf_counter() - begin
    sender.join()
    context.destroy(linger=0)
    return count / took


def _publish_plain(port: int, count: int, size: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    out = context.socket(zmq.PUB)
    out.set_hwm(0)
    out.connect(f"tcp://127.0.0.1:{port}")
    time.sleep(0.5)
    data = bytes(size)
    for _ in range(count + 1):
        out.send(data)
    out.close(linger=-1)
    context.term()


def bare_forwarder(count: int, size: int) -> float:
    """Records a second through libzmq's forwarder in a process of its own, the same bytes again and again."""
    keep_freed_memory()
    ours, theirs = SPAWN.Pipe()
    taken = SPAWN.Value(ctypes.c_int64, 0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    heard = context.socket(zmq.SUB)
    heard.set_hwm(0)
    heard.subscribe(b"")
    forwarder = SPAWN.Process(target=_forward_barely, args=(theirs,), daemon=True)
    forwarder.start()
    inward, outward = ours.recv()
    heard.connect(f"tcp://127.0.0.1:{outward}")
    with running(_publish_barely, inward, count, size, taken):
        heard.recv(copy=False)
        begin = time.perf_counter()
        for n in range(count // BARE_RECORDS):
            heard.recv(copy=False)
            taken.value = n + 1
        took = time.perf_counter() - begin
    forwarder.kill()
    context.destroy(linger=0)
    return count / took


def _forward_barely(ports: Connection) -> None:
    keep_freed_memory()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inward, outward = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    inward.set_hwm(0)
    outward.set_hwm(0)
    ports.send([end.bind_to_random_port("tcp://127.0.0.1") for end in (inward, outward)])
    zmq.proxy(inward, outward)


def _publish_barely(port: int, count: int, size: int, taken: Any) -> None:
    keep_freed_memory()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    out = context.socket(zmq.PUB)
    out.set_hwm(0)
    out.connect(f"tcp://127.0.0.1:{port}")
    time.sleep(1.0)
    data = bytes(size * BARE_RECORDS)
    for n in range(-1, count // BARE_RECORDS):
        while n - taken.value > IN_FLIGHT // BARE_RECORDS:
            time.sleep(0.001)
        out.send(data, copy=False)
    out.close(linger=-1)
    context.term()


def portal_calls(count: int, size: int, port: int) -> float:
    """Records a second that a portal client hands to a server, which answers each; NaN where it is not installed."""
    try:
        import portal
    except ImportError:
        return math.nan
    server = SPAWN.Process(target=_answer_portal, args=(port,), daemon=True)
    server.start()
    client, data = portal.Client(f"127.0.0.1:{port}", logging=False), np.ones(size, np.uint8)
    try:
        client.put(data).result()
        begin = time.perf_counter()
        waiting: deque[Any] = deque()
        for _ in range(count):
            waiting.append(client.put(data))
            if len(waiting) >= PORTAL_AT_ONCE:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
        return count / (time.perf_counter() - begin)
    finally:
        client.close()
        server.kill()
        server.join()


def _answer_portal(port: int) -> None:
    import portal

    server = portal.Server(port, host="127.0.0.1", logging=False)
    server.bind("put", len)
    server.start()


def with_system(arguments: argparse.Namespace, measure: Callable[..., Any], *more: Any) -> Any:
    """Run a measurement with a controller of its own."""
    hub = HubAddress("127.0.0.1", arguments.port)
    with tempfile.TemporaryDirectory() as run_dir:
        overrides = ["experiment=noise", f"hub={hub}", f"run_dir={run_dir}"]
        command = [sys.executable, "-m", "ami_controller.main", *overrides]
        controller = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            wait_until_idle(controller.pid)
            return measure(overrides, arguments, *more)
        finally:
            controller.send_signal(signal.SIGTERM)
            controller.wait(timeout=15)


def wait_until_idle(pid: int) -> None:
    """A controller that begins starts what it writes the learning record with: that is not to be measured."""
    controller = psutil.Process(pid)

    def is_idle() -> bool:
        before = cpu_seconds(controller, *controller.children(recursive=True))
        time.sleep(0.5)
        return cpu_seconds(controller, *controller.children(recursive=True)) - before < 0.025

    time.sleep(2.0)
    wait_until(is_idle, 60.0, what="the controller does not come to rest")


def wait_until_controller_idle() -> None:
    """It loads more when the first services have joined."""
    (controller,) = [p for p in psutil.Process().children() if "ami_controller.main" in p.cmdline()]
    wait_until_idle(controller.pid)


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run a function in a process until the block ends."""
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        if process.pid and process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def stream_through(
    overrides: list[str],
    arguments: argparse.Namespace,
    near: bool = True,
    joins: tuple[list[str], list[str]] = ([], []),
) -> float:
    """Records a second from a body's loop to a trainer's buffer.

    Args:
        near: whether the trainer finds the body's memory.
        joins: more overrides of trainer and body, their key files.
    """
    shared = Shared()
    trainer = ([*overrides, *joins[0]], shared, "image_vae", near)
    body = ([*overrides, *joins[1]], shared, arguments.size, arguments.records)
    with running(be_trainer, *trainer), running(be_body, *body):
        wait_until(lambda: shared.taken.value > 0)
        wait_until_controller_idle()
        shared.go.set()
        begin, first = time.perf_counter(), shared.taken.value
        wait_until(lambda: shared.taken.value >= first + arguments.records, pause_s=0.005)
        took = time.perf_counter() - begin
        shared.end.set()
    check_nothing_lost(shared)
    return float(arguments.records / took)


def catch_up(overrides: list[str], arguments: argparse.Namespace, near: bool = True) -> float:
    """Records a second that a new trainer takes of the past while the live stream goes on."""
    shared = Shared()
    behind = int(RING_BYTES * 0.8 / arguments.size)
    with running(be_body, overrides, shared, arguments.size, 0, behind):
        wait_until(lambda: shared.published.value >= behind)
        wait_until_controller_idle()
        with running(be_trainer, overrides, shared, "image_vae", near):
            wait_until(lambda: shared.rate.value > 0)
            shared.end.set()
    check_nothing_lost(shared)
    return float(shared.rate.value)


def publishing_cost(
    overrides: list[str], arguments: argparse.Namespace, trouble: str, near: bool
) -> tuple[float, float, float]:
    """Milliseconds that handing over a record takes: p50, p99, max."""
    shared = Shared()
    costs = SPAWN.Queue()
    body = (overrides, shared, arguments.size, 0, 0, costs)
    taking_s = SLOWER / LIVE_HZ if trouble == "slow" else 0.0
    with running(be_trainer, overrides, shared, "image_vae", near, taking_s) as trainer, running(be_body, *body):
        wait_until(lambda: shared.taken.value > 0)
        if trouble in ("stopped", "dead"):
            os.kill(trainer.pid, signal.SIGSTOP if trouble == "stopped" else signal.SIGKILL)
        shared.go.set()
        taken = np.array(costs.get(timeout=60)) * 1e3
        shared.end.set()
    return float(np.quantile(taken, 0.5)), float(np.quantile(taken, 0.99)), float(taken.max())


def to_trainers(overrides: list[str], arguments: argparse.Namespace, count: int, near: bool) -> tuple[float, float]:
    """Records a second that each of several trainers takes, and the cores that all processes kept busy."""
    all_shared = [Shared() for _ in range(count)]
    paces = Slowest(all_shared)
    trainers = [
        SPAWN.Process(target=be_trainer, args=(overrides, s, f"t{n}", near), daemon=True)
        for n, s in enumerate(all_shared)
    ]
    for trainer in trainers:
        trainer.start()
    try:
        with running(be_body, overrides, paces.body, arguments.size, arguments.records):
            wait_until(lambda: paces.update() > 0)
            wait_until_controller_idle()
            paces.body.go.set()
            begin, busy, first = time.perf_counter(), cpu_seconds(*descendants()), paces.update()
            wait_until(lambda: paces.update() >= first + arguments.records, 120.0, 0.0003)
            took, busy = time.perf_counter() - begin, cpu_seconds(*descendants()) - busy
            paces.body.end.set()
        for shared in all_shared:
            check_nothing_lost(shared)
    finally:
        for shared, trainer in zip(all_shared, trainers, strict=True):
            shared.end.set()
            trainer.join(timeout=5)
            trainer.kill()
    return arguments.records / took, busy / took


class Slowest:
    """What the body sees of several trainers: how far the slowest is."""

    def __init__(self, all_shared: Sequence[Shared]) -> None:
        self.body, self._all = Shared(), all_shared

    def update(self) -> int:
        self.body.taken.value = min(shared.taken.value for shared in self._all)
        return int(self.body.taken.value)


def wait_until(
    condition: Callable[[], bool],
    timeout_s: float = 60.0,
    pause_s: float = 0.001,
    what: str = "the stream stands still",
) -> None:
    """Poll; end the benchmark if it takes too long, and say what it is that does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: waited {timeout_s:g} s")
        time.sleep(pause_s)


def check_nothing_lost(shared: Shared) -> None:
    if shared.lost.value:
        raise SystemExit(f"{shared.lost.value} records were lost: the figure would be worth nothing")


def be_trainer(
    overrides: list[str], shared: Shared, name: str = "image_vae", near: bool = True, taking_s: float = 0.0
) -> None:
    """A trainer's intake with a buffer, and nothing else; it takes so many seconds more for each record."""
    if not near:
        shared_memory.can_share = lambda: False
    keep_freed_memory()
    sys.setswitchinterval(0.0005)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    config = load_config(overrides)
    hub, identity = hub_of(config, "trainer", name), Identity(name, "trainer", agreement(config))
    link = ControlLink(context, hub, identity, Gate(), MetricsQueue(), Hooks())
    buffer: dict[str, np.ndarray] = {}
    begun: list[float] = []

    def consume(batch: RecordBatch, continues: bool) -> None:
        begun.append(time.perf_counter()) if not begun else None
        data = batch.data["observation"]
        if not buffer:
            slots = max(64, BUFFER_BYTES // data[0].nbytes)
            buffer["frames"] = np.ones((slots, *data.shape[1:]), np.uint8)  # memory at hand: a life fills it only once
        place = buffer["frames"]
        place[np.arange(batch.first_sequence, batch.end) % len(place)] = data
        time.sleep(taking_s * len(batch))
        shared.taken.value = batch.end
        shared.records.value += len(batch)

    intake = Intake(context, hub, identity, consume, 1 << 40, link.send)
    link.start()
    link.wait_joined()
    intake.start()
    while not shared.end.is_set():
        time.sleep(0.01)
        streams = list(intake.streams.values())
        shared.lost.value = sum(stream.counters.lost for stream in streams)
        caught_up = intake.feeder.records > 500 and all(stream.behind < 64 for stream in streams)
        if caught_up and not shared.rate.value:
            shared.rate.value = intake.feeder.records / (time.perf_counter() - begun[0])
    intake.close()
    link.leave()


def be_body(
    overrides: list[str],
    shared: Shared,
    size: int,
    total: int,
    at_once: int = 0,
    costs: Any = None,
    name: str = "body",
    live_hz: float = LIVE_HZ,
) -> None:
    """A body's sender.

    `at_once` records come first, then few; at the word to go `total` as fast as the trainer takes them, or on and on.
    """
    keep_freed_memory()
    sys.setswitchinterval(0.0005)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    config = load_config(overrides)
    hub, identity = hub_of(config, "body", name), Identity(name, "body", agreement(config))
    sender = ExperienceSender(context, hub, name, identity.incarnation, RING_BYTES)
    sender._ring._content.fill(1)  # memory at hand: a life fills it only once

    def on_message(message: Message) -> None:
        if message.kind == FETCH:
            sender.fetch(message)

    link = ControlLink(context, hub, identity, Gate(), MetricsQueue(), Hooks(on_message=on_message))
    link.start()
    link.wait_joined()
    sender.start()
    frame = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    sequence, took = 0, []
    in_flight = min(IN_FLIGHT, RING_BYTES // 2 // size)
    step = max(1, min(32, STEP_BYTES // size))  # between two looks: asking the other process takes as long as a record
    going, stop_at = False, 0
    while sequence % step or not shared.end.is_set():
        if not going and sequence >= at_once and shared.go.is_set():
            going, stop_at = True, -(-(sequence + total) // step) * step
        if total and going and sequence >= stop_at:
            time.sleep(0.01)
            continue
        if sequence < at_once or (total and going):
            if sequence % step == 0:
                reached = sender.published if sequence < at_once else shared.taken.value
                most = min(800, in_flight) if sequence < at_once else in_flight
                if sequence - reached > most or sender.unsent > 800:
                    time.sleep(0.001)
                    continue
        else:
            pause_s = max(1 / live_hz, size / FEW_BYTES if total else 0.0)
            if total:
                shared.go.wait(pause_s)
            else:
                time.sleep(pause_s)
        record = Record(0, sequence, time.time(), 0.0, {"m": 1}, {"observation": frame})
        begin = time.perf_counter()
        sender.put(record)
        if costs is not None and going:
            took.append(time.perf_counter() - begin)
            if len(took) == 5 * LIVE_HZ:
                costs.put(took)
        sequence += 1
        if sequence % step == 0:
            shared.published.value = sender.published
    sender.close()
    link.leave()


def descendants() -> list[psutil.Process]:
    """All processes that this one has started, and theirs."""
    return list(psutil.Process().children(recursive=True))


def cpu_seconds(*processes: psutil.Process) -> float:
    """Seconds that processes have used of all cores."""
    used = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
            used += times.user + times.system
        except psutil.Error:
            continue
    return used


if __name__ == "__main__":
    main()
