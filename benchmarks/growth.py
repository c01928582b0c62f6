"""How the cost of the streams grows with the size of a record, with trainers, bodies, and the size of a snapshot.

Each table has its yardstick in the same run, the slope of cost over size (exponent of a power law between neighbouring
rows: 0 = it costs the same, 1 = in proportion), and is measured through a real controller with all promises on.

    python benchmarks/growth.py [--seconds 3] [--most-mib 2048]
"""

from __future__ import annotations

import argparse
import math
import os
import time

import snapshots
import streams
from ending import end_with_children
from streams import (
    SPAWN,
    Shared,
    be_body,
    be_trainer,
    check_nothing_lost,
    cpu_seconds,
    descendants,
    running,
    to_trainers,
    wait_until,
    wait_until_controller_idle,
    with_system,
)

RECORD_SIZES = (1_000, 5_000, 25_000, 100_000, 500_000, 4_000_000)
COUNTS = (1, 2, 4, 8, 16)
BYTES_A_RUN = 400_000_000
MOST_RECORDS = 40_000
PACED_HZ = 100


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row with several trainers or bodies")
    parser.add_argument("--most-mib", type=int, default=2048, help="largest snapshot")
    parser.add_argument("--port", type=int, default=5690)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    by_record_size(arguments)
    by_trainers(arguments)
    by_bodies(arguments)
    by_snapshot_size(arguments)


def by_record_size(arguments: argparse.Namespace) -> None:
    """One body to one trainer's buffer, as fast as it goes."""
    print(
        f"\n{'record, bytes':>13} {'raw TCP/s':>10} {'same host/s':>11} {'ratio':>6} {'MB/s':>7} {'slope':>6} "
        f"{'TCP/s':>8} {'ratio':>6} {'slope':>6}"
    )
    memory: list[tuple[float, float]] = []
    wire: list[tuple[float, float]] = []
    for size in RECORD_SIZES:
        count = min(MOST_RECORDS, max(60, BYTES_A_RUN // size))
        raw = streams.raw_tcp(count, size)
        of = argparse.Namespace(port=arguments.port, size=size, records=count)
        same, hubs = (with_system(of, streams.stream_through, near) for near in (True, False))
        memory.append((size, 1 / same))
        wire.append((size, 1 / hubs))
        print(
            f"{size:13} {raw:10.0f} {same:11.0f} {same / raw:6.2f} {same * size / 1e6:7.0f} {slope(memory):>6} "
            f"{hubs:8.0f} {hubs / raw:6.2f} {slope(wire):>6}",
            flush=True,
        )


def by_trainers(arguments: argparse.Namespace) -> None:
    """One body as fast as the slowest of its trainers takes it: records a second each, and of one alone.

    The slope is that of the work of all cores for a record that all of them take.
    """
    print(
        f"\n{'trainers':>8} {'where':>9} {'raw TCP/s':>10} {'each, 1/s':>10} {'ratio':>6} {'of one':>7} "
        f"{'all, MB/s':>10} {'cores busy':>10} {'us a record':>11} {'slope':>6}"
    )
    for near in (True, False):
        alone, costs = 0.0, []
        for count in COUNTS:
            of = argparse.Namespace(port=arguments.port, size=25_000, records=MOST_RECORDS)
            raw = streams.raw_tcp(MOST_RECORDS, 25_000)
            each, cores = with_system(of, to_trainers, count, near)
            alone = alone or each
            us = cores / each * 1e6
            costs.append((float(count), us))
            print(
                f"{count:8} {'same host' if near else 'TCP':>9} {raw:10.0f} {each:10.0f} {each / raw:6.2f} "
                f"{each / alone:7.2f} {each * count * 0.025:10.0f} {cores:10.2f} {us:11.0f} {slope(costs):>6}",
                flush=True,
            )


def by_bodies(arguments: argparse.Namespace) -> None:
    """Bodies at a fixed pace to one trainer: what it costs, and whether all arrives."""
    print(f"\neach body at {PACED_HZ} records a second")
    print(
        f"{'bodies':>6} {'records/s':>10} {'arrived':>8} {'cores busy':>10} {'slope':>6} {'us of a core a record':>22} "
        f"{'of one raw TCP record':>22}"
    )
    raw_us, costs = 1e6 / streams.raw_tcp(MOST_RECORDS, 25_000), []
    for count in COUNTS:
        of = argparse.Namespace(port=arguments.port, size=25_000, seconds=arguments.seconds)
        made, arrived, cores = with_system(of, from_bodies, count)
        rate = made / arguments.seconds
        costs.append((float(count), cores))
        us = cores / rate * 1e6
        print(
            f"{count:6} {rate:10.0f} {arrived / made:8.3f} {cores:10.2f} {slope(costs):>6} "
            f"{us:22.0f} {us / raw_us:22.1f}",
            flush=True,
        )


def from_bodies(overrides: list[str], arguments: argparse.Namespace, count: int) -> tuple[int, int, float]:
    """Records made and arrived in the time given, and cores busy, with several bodies at a fixed pace."""
    trainer, bodies = Shared(), [Shared() for _ in range(count)]
    processes = [
        SPAWN.Process(
            target=be_body, args=(overrides, s, arguments.size, 0, 0, None, f"body{n}", PACED_HZ), daemon=True
        )
        for n, s in enumerate(bodies)
    ]
    with running(be_trainer, overrides, trainer):
        for process in processes:
            process.start()
        wait_until(lambda: all(shared.published.value > 0 for shared in bodies), 120.0)
        wait_until_controller_idle()
        before, busy = sum(shared.published.value for shared in bodies), cpu_seconds(*descendants())
        taken = trainer.records.value
        time.sleep(arguments.seconds)
        made, busy = sum(shared.published.value for shared in bodies) - before, cpu_seconds(*descendants()) - busy
        arrived = trainer.records.value - taken
        for shared in (*bodies, trainer):
            shared.end.set()
        for process in processes:
            process.join(timeout=5)
            process.kill()
    check_nothing_lost(trainer)
    return made, arrived, busy / arguments.seconds


def by_snapshot_size(arguments: argparse.Namespace) -> None:
    """A snapshot from ready to usable, in shared memory and over TCP through the hub."""
    print(f"\n{'MiB':>6} {'memcpy':>8} {'raw TCP':>8} {'same host':>10} {'slope':>6} {'TCP, hub':>9} {'slope':>6}   ms")
    hub = snapshots.HubAddress("127.0.0.1", arguments.port)
    memory: list[tuple[float, float]] = []
    wire: list[tuple[float, float]] = []
    with snapshots.controller(hub):
        mib = 1
        while mib <= arguments.most_mib:
            nbytes, repeats = mib * snapshots.MIB, 5 if mib <= 128 else 3
            memcpy = min(snapshots.time_memcpy(nbytes, repeats))
            raw = min(snapshots.time_raw_tcp(nbytes, repeats))
            memory.append((mib, snapshots.through(hub, nbytes, repeats)[0]))
            wire.append((mib, snapshots.through(hub, nbytes, repeats, shared=False)[0]))
            same, hubs = memory[-1][1], wire[-1][1]
            print(
                f"{mib:6} {memcpy:8.2f} {raw:8.2f} {same:10.2f} {slope(memory):>6} {hubs:9.2f} {slope(wire):>6}",
                flush=True,
            )
            mib *= 4 if mib < 512 else 2


def slope(rows: list[tuple[float, float]]) -> str:
    """The exponent with which the cost grew since the row before."""
    if len(rows) < 2:
        return ""
    (small, cheap), (large, dear) = rows[-2:]
    return f"{math.log(dear / cheap) / math.log(large / small):.2f}"


if __name__ == "__main__":
    main()
