"""What goes wrong outside: one clear line and the right exit code, or counted, shown and survived."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
import pytest
import zmq
from processes import Process, System, one_error_line, poll_for

from ami_shared import wire
from ami_shared.bus import Port
from ami_shared.wire import Message

MakeSystem = Callable[..., System]


@pytest.mark.parametrize(
    ("service", "override", "named"),
    [
        ("controller", "hub.port=1", "hub"),
        ("body", "inference.intervall=0.1", "intervall"),
        ("body", "inference.interval=soon", "interval"),
        ("image_vae", "trainer=nobody", "nobody"),
        ("image_vae", "trainers.image_vae.service.threads=two", "threads"),
        ("image_vae", "trainers.image_vae.batch_size=many", "batch_size"),
        ("body", "inference.torch_threads=0", "torch_threads"),
        ("body", "inference.agent.models=[nope]", "nope"),
        ("controller", "experiment=nowhere", "nowhere"),
        ("body", "inference.environment.actuator.host=no.such.host.invalid", "no.such.host.invalid"),
        ("body", "inference.environment.actuator.speeds=[2,1,1]", "speeds"),
        ("world", "world.scenario=no_such_place", "no_such_place"),
        ("controller", "controller.bind=0.0.0.0", "insecure"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    make_system: MakeSystem, service: str, override: str, named: str
) -> None:
    process = make_system().start(service, override)
    assert process.exit_code() == 2, process.output
    assert named in one_error_line(process.output)


def test_up_ends_with_exit_code_2_when_a_service_cannot_run_as_configured(make_system: MakeSystem) -> None:
    system = make_system("inference.environment.actuator.host=no.such.host.invalid")
    up = system.start("up")
    assert up.exit_code() == 2, up.output
    assert "no.such.host.invalid" in up.output
    assert "Traceback" not in up.output
    poll_for(lambda: not system.leftovers(), what="no process left")


def test_a_second_up_at_the_same_address_ends_and_leaves_the_first_alone(make_system: MakeSystem) -> None:
    first, second = make_system("experiment=noise"), make_system("experiment=noise")
    first.start("up")
    first.wait_running()
    up = second.start("up", f"hub={first.hub}")
    assert up.exit_code() == 2, up.output
    assert "running" not in up.output
    assert str(first.hub.port) in up.output
    assert first.status()["system"] == "running"


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_a_taken_port_is_named(make_system: MakeSystem, offset: int) -> None:
    system = make_system("experiment=noise")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", system.hub.port + offset))
        holder.listen()
        process = system.start("controller")
        assert process.exit_code() == 2
    assert str(system.hub.port + offset) in one_error_line(process.output)


def test_commands_without_a_controller_say_so_with_exit_code_3(make_system: MakeSystem) -> None:
    system = make_system()
    for command in ("status", "pause", "shutdown"):
        done = system.ami(command)
        assert done.returncode == 3
        assert str(system.hub) in one_error_line(done.stderr)
    assert system.ami("frobnicate").returncode == 2


def test_a_body_without_a_camera_waits_and_says_so(make_system: MakeSystem) -> None:
    system = make_system()
    system.start("controller")
    body = system.start("body")
    system.wait_for_state("body", "blind")
    assert "cannot be opened" in system.service("body")["trouble"]
    assert "camera" in system.ami("status").stdout
    assert body.output.count("camera lost") == 1


def test_two_bodies_of_one_name_are_refused(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    system.start("controller")
    system.start("image_vae")
    first = system.start("body")
    system.wait_running()
    second = system.start("body")
    assert second.exit_code() == 2
    assert "taken" in one_error_line(second.output)
    assert first.popen.poll() is None
    assert system.service("body")["pid"] == first.pid
    records_still_arrive(system)


def records_still_arrive(system: System) -> None:
    """What one that was refused has said is not to count against the one that lives."""
    received = system.status()["experience"][0]["received"]["image_vae"]
    poll_for(
        lambda: system.status()["experience"][0]["received"]["image_vae"] > received + 20, what="records still arrive"
    )
    assert system.status()["experience"][0]["lost"]["image_vae"] == 0


def test_another_configuration_is_refused_with_what_differs(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    system.start("controller")
    system.start("image_vae")
    system.start("body")
    system.wait_running()
    body = system.start("body", "models=small", "inference.interval=0.2")
    assert body.exit_code() == 2
    line = one_error_line(body.output)
    assert "models.image_" in line
    assert "inference.interval" in line
    records_still_arrive(system)


def test_junk_on_every_port_is_counted_and_survived(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    system.start("up")
    system.wait_running()
    random = np.random.default_rng(7)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    topics = {Port.EXPERIENCE_IN: b"places/x", Port.PARAMETERS_IN: b"notices/image_encoder/"}

    def counted(port: Port) -> bool:
        hub = system.status()["hub"]
        if port is Port.CONTROL:
            return bool(hub["wire_errors"] >= 300)
        if port is Port.EXPERIENCE_IN:
            return bool(system.service("image_vae")["wire_errors"] >= 300)
        if port is Port.PARAMETERS_IN:
            return bool(hub["snapshots_refused"] > 0 and system.service("body")["wire_errors"] > 0)
        return True

    def flood(port: Port, peer: zmq.Socket[bytes]) -> bool:
        for n in range(300):
            time.sleep(0.05 if n % 50 == 49 else 0.0)  # queues are short, and what does not fit is dropped
            parts = [random.bytes(int(random.integers(0, 200))) for _ in range(random.integers(1, 5))]
            peer.send_multipart([topics.get(port, b""), *parts])
        lie = Message("records", "body", "x", {"first": 0}, {"segment": np.zeros(3, np.int8)}, topics.get(port, b""))
        peer.send_multipart(wire.encode(lie))
        time.sleep(1.0)  # until heartbeats tell of it
        return counted(port)

    for port, kind in (
        (Port.CONTROL, zmq.DEALER), (Port.EXPERIENCE_IN, zmq.PUB), (Port.EXPERIENCE_OUT, zmq.XSUB),
        (Port.PARAMETERS_IN, zmq.PUB), (Port.PARAMETERS_OUT, zmq.XSUB),
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", system.hub.port + port.value)) as raw:
            raw.sendall(random.bytes(20_000))
        peer = context.socket(kind)
        peer.linger = 500
        peer.connect(system.hub.endpoint(port))
        time.sleep(0.3)
        poll_for(lambda port=port, peer=peer: flood(port, peer), what=f"junk at {port.name} is counted")
        peer.close()
    poll_for(lambda: system.status()["hub"]["handshakes_failed"] >= 5, what="strangers at every port are counted")
    context.destroy(linger=0)
    before = system.status()["experience"][0]["received"]["image_vae"]
    poll_for(lambda: system.status()["experience"][0]["received"]["image_vae"] > before + 10, what="life goes on")
    assert "malformed" in system.ami("status").stdout


def test_an_mlflow_server_that_is_down_is_shown_and_survived(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", "tracker.uri=http://127.0.0.1:9")
    system.start("up")
    system.wait_running()
    tracker = poll_for(
        lambda: system.status()["tracker"]["trouble"] and system.status()["tracker"], 60, "trouble shown"
    )
    assert "MLflow" in tracker["trouble"]
    poll_for(lambda: (system.run_dir / "metrics.jsonl").exists(), what="JSON Lines go on")
    assert system.service("body")["state"] == "running"
    assert system.ami("shutdown").returncode == 0


def test_a_run_directory_that_cannot_be_made_is_named(make_system: MakeSystem, tmp_path: object) -> None:
    system = make_system("experiment=noise")
    (system.folder / "file").write_text("")
    process: Process = system.start("controller", f"run_dir={system.folder / 'file' / 'run'}")
    assert process.exit_code() == 2
    assert "run_dir" in one_error_line(process.output)
