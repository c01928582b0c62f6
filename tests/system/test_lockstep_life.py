"""Body and trainer in lockstep, as processes: every record is learned from, and the same seed lives the same life."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from processes import Process, System, one_error_line, poll_for

MakeSystem = Callable[..., System]
SMALL_WINDOWS = ("lockstep_window=128", "trainers.ppo.rollout_length=128", "trainers.ppo.epochs=4")
REPRODUCED_STEPS = 1_500


def cart_pole(make_system: MakeSystem, *overrides: str) -> System:
    return make_system("experiment=cartpole", *SMALL_WINDOWS, *overrides, models="vector")


def start_all(system: System) -> dict[str, Process]:
    return {name: system.start(name) for name in ("controller", "ppo", "body")}


def steps(system: System) -> int:
    return int(system.service("body").get("steps", 0))


def goes_on(system: System, by: int = 256) -> bool:
    """Whether the body takes more steps."""
    before = steps(system)
    return bool(poll_for(lambda: steps(system) >= before + by, 120, f"{by} more steps than {before}"))


def stands(system: System) -> bool:
    """Whether the body waits at the end of a window."""
    counted: list[int] = []

    def the_same() -> bool:
        counted.append(steps(system))
        latest = counted[-24:]  # over more than a heartbeat
        return len(latest) == 24 and len(set(latest)) == 1 and latest[0] % 128 == 1

    return bool(poll_for(the_same, 30, "the body stands"))


def stream(system: System) -> dict[str, Any]:
    """What the status tells of the body's experience."""
    experience: dict[str, Any] = system.status()["experience"][0]
    return experience


def first_life(system: System, records: int) -> list[tuple[bytes, ...]]:
    """Start everything, and return the body's first records without their times."""
    system.start("controller")
    poll_for(lambda: system.ami("status").returncode == 0, what="a controller")
    heard: dict[int, tuple[bytes, ...]] = {}
    with system.listening() as collect:
        system.start("ppo")
        system.start("body")

        def enough() -> bool:
            for batch in collect(0.2):
                for n in range(len(batch)):
                    columns = (batch.segments, batch.endings, batch.swapped, *batch.versions.values())
                    columns += tuple(batch.data[name] for name in sorted(batch.data))
                    heard[batch.first_sequence + n] = tuple(column[n].tobytes() for column in columns)
            return all(sequence in heard for sequence in range(records))

        poll_for(enough, 300, "records")
    system.close()
    return [heard[sequence] for sequence in range(records)]


def test_in_lockstep_every_record_is_learned_from(make_system: MakeSystem) -> None:
    system = cart_pole(make_system)
    start_all(system)
    system.wait_running()
    assert goes_on(system, by=2_000)
    version = system.model("policy_value")["version"]
    assert version > 5
    assert goes_on(system)
    assert system.model("policy_value")["version"] > version
    system.command("pause")
    poll_for(lambda: stream(system)["received"]["ppo"] == steps(system), what="all records at the trainer")
    body, trainer, sent = system.service("body"), system.service("ppo"), stream(system)
    assert (sent["overflowed"], sent["lost"]) == (0, {"ppo": 0})
    # At most the window that was begun has not been learned from: 128 steps, and one more that tells their worth.
    unlearned = body["steps"] - trainer["limiter"]["used"] - trainer["limiter"]["unusable"]
    assert 0 <= unlearned <= 128 + 1
    assert trainer["limiter"]["overflowed"] == trainer["limiter"]["stale"] == 0


def test_the_same_seed_lives_the_same_life_to_the_last_bit(make_system: MakeSystem) -> None:
    lives = [first_life(cart_pole(make_system, "seed=1"), REPRODUCED_STEPS) for _ in range(2)]
    assert lives[0] == lives[1]
    assert len({versions for _, _, _, versions, *_ in lives[0]}) > 5, "the policy has learned meanwhile"


def test_a_pause_reaches_a_body_that_waits_for_a_stopped_trainer(make_system: MakeSystem) -> None:
    system = cart_pole(make_system)
    processes = start_all(system)
    system.wait_running()
    assert goes_on(system)
    processes["ppo"].signal(signal.SIGSTOP)
    try:
        assert stands(system)
        paused = system.ami("pause", "--timeout", "30")
        assert "ppo" in paused.stdout + paused.stderr, "who did not confirm is named"
        system.wait_for_state("body", "paused")
        resumed = system.ami("resume", "--timeout", "30")
        assert "body" not in resumed.stdout + resumed.stderr, "it confirmed, and goes on waiting"
        system.wait_for_state("body", "running")
        assert stands(system)
    finally:
        processes["ppo"].signal(signal.SIGCONT)
    assert goes_on(system)
    assert stream(system)["lost"] == {"ppo": 0}


def test_a_stopped_trainer_does_not_keep_the_body_from_ending(make_system: MakeSystem) -> None:
    system = cart_pole(make_system)
    processes = start_all(system)
    system.wait_running()
    assert goes_on(system)
    processes["ppo"].signal(signal.SIGSTOP)
    try:
        assert stands(system)
        processes["body"].signal(signal.SIGINT)
        assert processes["body"].exit_code() == 0
    finally:
        processes["ppo"].signal(signal.SIGCONT)


def test_a_body_goes_on_with_the_trainer_that_follows_a_killed_one(make_system: MakeSystem) -> None:
    system = cart_pole(make_system)
    processes = start_all(system)
    system.wait_running()
    assert goes_on(system)
    processes["ppo"].kill()
    assert stands(system)
    assert processes["body"].popen.poll() is None
    version = system.model("policy_value")["version"]
    system.start("ppo")
    assert goes_on(system, by=1_000)
    used = system.model("policy_value")["used"]["body"]
    assert used > version, "it learns from the new one"
    assert stream(system)["lost"] == {"ppo": 0}


def test_a_body_that_is_killed_and_returns_is_waited_with_as_before(make_system: MakeSystem) -> None:
    system = cart_pole(make_system)
    processes = start_all(system)
    system.wait_running()
    assert goes_on(system)
    processes["body"].kill()
    second = system.start("body")
    poll_for(lambda: system.service("body").get("pid") == second.pid, what="the new body has joined")
    assert goes_on(system, by=1_000)


@pytest.mark.slow
def test_a_body_is_not_waited_for_for_ever_that_left_in_the_middle_of_a_window(make_system: MakeSystem) -> None:
    long_window = ("lockstep_window=65536", "trainers.ppo.rollout_length=65536", "trainers.ppo.batch_size=4096")
    system = cart_pole(make_system, *long_window)
    start_all(system)
    system.wait_running()
    second = system.start("body", "inference.name=second")
    poll_for(lambda: system.service("second").get("steps", 0) > 1, 120, "the second one's first window")
    second.signal(signal.SIGSTOP)
    left_at = system.service("second")["steps"] % 65_536
    assert 1 < left_at < 40_000, "in the middle, also of what it did since it was last heard"
    second.kill()
    assert goes_on(system, by=2 * 65_536)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("policy_input=image", "policy_input"),
        ("action.choices=[3]", "action.choices"),
        ("inference.environment.id=Nowhere-v0", "Nowhere"),
        ("inference.environment.id=Pendulum-v1", "not discrete"),
        ("inference.agent.models=[]", "policy_value"),
    ],
)
def test_a_body_that_does_not_fit_its_world_is_one_line_and_exit_code_2(
    make_system: MakeSystem, override: str, named: str
) -> None:
    process = cart_pole(make_system).start("body", override)
    assert process.exit_code() == 2, process.output
    assert named in one_error_line(process.output)
