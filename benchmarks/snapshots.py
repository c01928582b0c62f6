"""How long a snapshot takes from ready to usable, and what it costs those who train and act meanwhile.

Ours goes the whole way: copied between two gradient steps, made known through a real controller, checked against the
model's layout, and ready for the swap before the next step; over the wire also sealed and verified with a digest. The
trainer computes all the while, as trainers do. Every size stands beside yardsticks of the same minute: memcpy, raw TCP
between two Python processes, and portal's calls if it is installed. All of them, and ours, go on at once with the next;
"rested" is ours where everybody but the trainer rests in between, as a body does between two steps.

    python benchmarks/snapshots.py [--mib 1 16 128] [--repeats 9]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import zmq
from ending import end_with_children
from streams import wait_until_idle
from torch import nn

from ami_shared import shared_memory, wire
from ami_shared.bus import HubAddress, Port, dial
from ami_shared.membership import Identity
from ami_shared.memory import keep_freed_memory
from ami_shared.models.parameters import read_arrays
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.priority import set_thread_priority
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message
from ami_trainer.publishing import SnapshotPublisher

SPAWN = multiprocessing.get_context("spawn")
MIB = 1 << 20
TENSORS = 16
MODEL = "model"
MODELS = 4  # that a body uses
PRIORITY = "idle"  # of a trainer, by default
REST_S = 0.1
WARM_UP = 6  # snapshots, until all memory in turns is at hand on both sides


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--port", type=int, default=5660)
    arguments = parser.parse_args()
    hub = HubAddress("127.0.0.1", arguments.port)
    print(f"medians of {arguments.repeats}, ms; in brackets: of memcpy")
    names = ("memcpy", "raw TCP", "same host", "rested", "TCP, hub", "bfloat16", "portal", "trainer", "swap p99")
    print(f"{'MiB':>5}" + "".join(f"{name:>15}" for name in names) + f"{'TCP, hub / raw':>16}")
    with controller(hub):
        for mib in arguments.mib:
            print_row(hub, mib, arguments.repeats)
        round_trips(hub)
    for mib in arguments.mib:
        swaps = swaps_of_all(mib * MIB)
        p50, p99, largest = (float(np.quantile(swaps, share)) for share in (0.5, 0.99, 1.0))
        print(f"{len(swaps)} swaps of {MODELS} models, {mib} MiB: p50 {p50:.4f}, p99 {p99:.4f}, max {largest:.4f} ms")


def print_row(hub: HubAddress, mib: int, repeats: int) -> None:
    nbytes = mib * MIB
    memcpy = statistics.median(time_memcpy(nbytes, repeats))
    raw = statistics.median(time_raw_tcp(nbytes, repeats))
    memory, trainer, swap = through(hub, nbytes, repeats)
    rested, _, _ = through(hub, nbytes, repeats, rest_s=REST_S)
    wired, _, _ = through(hub, nbytes, repeats, shared=False)
    halved, _, _ = through(hub, nbytes, repeats, shared=False, halved=True)
    peer = time_portal(nbytes, repeats, hub.port + 20)
    cells = [f"{memcpy:9.2f}", *(f"{ms:9.2f} ({ms / memcpy:.2f})" for ms in (raw, memory, rested, wired, halved))]
    cells.append(f"{peer:9.2f} ({peer / memcpy:.2f})" if peer else "not installed")
    cells += [f"{trainer:9.2f} ({trainer / memcpy:.2f})", f"{swap:9.3f}"]
    print(f"{mib:5}" + "".join(f"{cell:>15}" for cell in cells) + f"{wired / raw:16.2f}", flush=True)


def time_memcpy(nbytes: int, repeats: int) -> list[float]:
    """Milliseconds in which the same tensors are copied to others."""
    sources, targets = ([p.detach().numpy() for p in a_model(nbytes).parameters()] for _ in "st")

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)

    return [milliseconds(copy) for _ in range(repeats + 1)][1:]


def milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def time_raw_tcp(nbytes: int, repeats: int) -> list[float]:
    """Milliseconds from the first byte sent to the last one received, buffers at hand on both sides."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours, theirs = SPAWN.Pipe()
        receiver = SPAWN.Process(target=_receive_raw, args=(server.getsockname()[1], nbytes, theirs), daemon=True)
        receiver.start()
        peer, _ = server.accept()
        data, took = np.ones(nbytes, np.uint8).data, []
        with peer:
            for _ in range(repeats + 1):
                begin = time.monotonic()
                peer.sendall(data)
                took.append((ours.recv() - begin) * 1e3)
        receiver.join()
    return took[1:]


def _receive_raw(port: int, nbytes: int, done: Connection) -> None:
    into = memoryview(bytearray(nbytes))
    with socket.create_connection(("127.0.0.1", port)) as stream:
        while True:
            got = 0
            while got < nbytes:
                if not (count := stream.recv_into(into[got:])):
                    return
                got += count
            done.send(time.monotonic())


def time_portal(nbytes: int, repeats: int, port: int) -> float | None:
    """Milliseconds in which a portal client hands an array of that size to a server and has its answer."""
    try:
        import portal
    except ImportError:
        return None
    server = SPAWN.Process(target=_serve_portal, args=(port,), daemon=True)
    server.start()
    client, data = portal.Client(f"127.0.0.1:{port}", logging=False), np.ones(nbytes, np.uint8)
    try:
        took = [milliseconds(lambda: client.put(data).result()) for _ in range(repeats + 1)]
    finally:
        client.close()
        server.kill()
        server.join()
    return statistics.median(took[1:])


def _serve_portal(port: int) -> None:
    import portal

    server = portal.Server(port, host="127.0.0.1", logging=False)
    server.bind("put", lambda data: len(data))
    server.start()


def a_model(nbytes: int) -> nn.Module:
    """Return a module whose parameters have so many bytes, in some large tensors and some small ones."""
    large = nn.ParameterList(nn.Parameter(torch.zeros(nbytes // 4 // TENSORS)) for _ in range(TENSORS))
    return nn.ModuleDict({"large": large, "small": nn.Linear(32, 32)})


def through(
    hub: HubAddress,
    nbytes: int,
    repeats: int,
    shared: bool = True,
    halved: bool = False,
    body_hub: HubAddress | None = None,
    rest_s: float = 0.0,
) -> tuple[float, float, float]:
    """Return medians of ready → usable and of the trainer's stall, and p99 of the body's swap, in milliseconds.

    Args:
        hub: as the trainer dials it.
        body_hub: as the body dials it, where that has credentials of its own.
        rest_s: seconds between a snapshot and the next.
    """
    to_body, body_end = SPAWN.Pipe()
    to_trainer, trainer_end = SPAWN.Pipe()
    with (
        running(be_body, body_hub or hub, nbytes, shared, body_end),
        running(be_trainer, hub, nbytes, halved, trainer_end),
    ):
        to_body.recv(), to_trainer.recv()
        took, stalls, swaps = [], [], []
        for _ in range(WARM_UP + repeats):
            to_trainer.send("publish")
            begun, stall = to_trainer.recv()
            if not to_body.poll(30):
                raise SystemExit("a snapshot never came")
            usable, swap = to_body.recv()
            took.append((usable - begun) * 1e3)
            stalls.append(stall * 1e3)
            swaps.append(swap * 1e3)
            time.sleep(rest_s)
        to_trainer.send("end"), to_body.send("end")
    return (
        statistics.median(took[WARM_UP:]),
        statistics.median(stalls[WARM_UP:]),
        float(np.quantile(swaps[WARM_UP:], 0.99)),
    )


def swaps_of_all(nbytes: int, count: int = 300) -> list[float]:
    """Milliseconds of a loop's swaps of models of that size in all, while another thread fills the spare copies."""
    names = [str(n) for n in range(MODELS)]
    replicas = Replicas({name: a_model(nbytes // MODELS) for name in names})
    arrays = read_arrays(a_model(nbytes // MODELS))
    ending = threading.Event()

    def fill() -> None:
        for version in itertools.count(1):
            for name in names:
                replicas.offer(Snapshot(name, version, 0.0, arrays))
            if ending.is_set():
                return

    filling = threading.Thread(target=fill)
    filling.start()
    took: list[float] = []
    while len(took) < count:
        before = replicas.versions
        ms = milliseconds(replicas.swap)
        took += [ms] * (replicas.versions is not before)
        time.sleep(0.001)
    ending.set()
    filling.join()
    return took


def be_trainer(hub: HubAddress, nbytes: int, halved: bool, orders: Connection) -> None:
    """Publishes its model when told to."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model = a_model(nbytes)
    me = Identity("image_vae", "trainer")
    publisher = SnapshotPublisher(zmq.Context(), hub, me, {MODEL: model}, 0.0, priority=PRIORITY, halved=halved)
    publisher.continue_from({MODEL: int(time.time() * 1000)})
    publisher.start()
    set_thread_priority(PRIORITY)
    time.sleep(1.0)  # so that subscriptions are known
    orders.send("ready")
    while train_until(orders) == "publish":
        begin = time.monotonic()
        publisher.offer()
        orders.send((begin, time.monotonic() - begin))
    publisher.close()


def train_until(orders: Connection) -> Any:
    """Keep a core busy in short steps until an order comes, and return it."""
    layer = torch.randn(256, 256)
    while not orders.poll():
        torch.mm(layer, layer)
    return orders.recv()


def be_body(hub: HubAddress, nbytes: int, shared: bool, told: Connection) -> None:
    """Follows the model; tells when each snapshot could be used, and how long the swap took."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if not shared:
        shared_memory.can_share = lambda: False
    replicas = Replicas({MODEL: a_model(nbytes)})
    offer = replicas.offer

    def timed_offer(snapshot: Snapshot) -> bool:
        taken = offer(snapshot)
        if taken:
            usable, begin = time.monotonic(), time.perf_counter()
            replicas.swap()
            told.send((usable, time.perf_counter() - begin))
        return taken

    replicas.offer = timed_offer  # type: ignore[method-assign]
    receiver = ParameterReceiver(zmq.Context(), hub, replicas, [MODEL])
    receiver.start()
    told.send("ready")
    told.recv()
    receiver.close()


def control_round_trip(hub: HubAddress, count: int = 3_000) -> float:
    """Return the median of a control message's round trip, encode to decode, in microseconds."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = dial(context, zmq.DEALER, hub, Port.CONTROL)
    ours = [ask_the_controller(link, n) for n in range(count)]
    context.destroy(linger=0)
    return statistics.median(ours)


def ask_the_controller(link: zmq.Socket[bytes], n: int) -> float:
    """Ask what time it is there, which takes about as many bytes both ways; return the microseconds that it took."""
    begin = time.perf_counter()
    link.send_multipart(wire.encode(Message("clock", "bench", "1", {"request": n})))
    answer = wire.decode(link.recv_multipart())
    assert answer.fields["request"] == n
    return (time.perf_counter() - begin) * 1e6


def round_trips(hub: HubAddress, rounds: int = 20, count: int = 200) -> None:
    """Print the control round trip beside a bare REQ/REP between two processes, in turns, for machines change."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = dial(context, zmq.DEALER, hub, Port.CONTROL)
    asking = context.socket(zmq.REQ)
    port = asking.bind_to_random_port("tcp://127.0.0.1")
    answering = SPAWN.Process(target=_answer, args=(port, rounds * count), daemon=True)
    answering.start()
    size = sum(len(frame) for frame in wire.encode(Message("clock", "bench", "x", {"request": 1})))
    ours, bare, ratios = [], [], []
    for _ in range(rounds):
        ours.append(statistics.median(ask_the_controller(link, n) for n in range(count)))
        bare.append(statistics.median(ask_barely(asking, size) for _ in range(count)))
        ratios.append(ours[-1] / bare[-1])
    context.destroy(linger=0)
    answering.join()
    ours_p50, bare_p50, ratio = map(statistics.median, (ours, bare, ratios))
    print(f"\ncontrol round trip p50 {ours_p50:.0f} us, bare REQ/REP {bare_p50:.0f} us: {ratio:.1f} x")


def ask_barely(asking: zmq.Socket[bytes], size: int) -> float:
    """Return the microseconds that so many bytes take there and back, undecoded."""
    begin = time.perf_counter()
    asking.send(bytes(size))
    asking.recv()
    return (time.perf_counter() - begin) * 1e6


def _answer(port: int, count: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    answering = context.socket(zmq.REP)
    answering.connect(f"tcp://127.0.0.1:{port}")
    for _ in range(count):
        answering.send(answering.recv())
    context.destroy(linger=500)


@contextmanager
def controller(hub: HubAddress) -> Iterator[None]:
    """A real controller for the block."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "ami_controller.main", "experiment=noise", f"hub={hub}", f"run_dir={run_dir}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            wait_until_idle(process.pid)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run a function in a process until the block ends."""
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.join(timeout=5)
        process.kill()


if __name__ == "__main__":
    main()
