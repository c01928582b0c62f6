"""`ami doctor`: checks this machine for an experiment, and says how to fix what is wrong."""

from __future__ import annotations

import base64
import http.client
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from ami_controller.cli.client import Client, CommandFailedError
from ami_controller.key_folder import KeyFolder
from ami_controller.places import check_bind_address
from ami_shared.bus import HubAddress, Port
from ami_shared.command import NOT_LOADED
from ami_shared.config import load_config, loop_priority
from ami_shared.errors import AmiError, JoinRefusedError
from ami_shared.keys import KeyFile
from ami_shared.osc import check_target, resolve
from ami_shared.priority import set_thread_priority
from ami_shared.process import usable_cores
from ami_shared.uris import sqlite_uri, without_passwords

LEAST_DISK_BYTES = 2e9
MONTHS_DISK_BYTES = 50e9  # for all kept checkpoints, and three months of the learning record
PACKAGES = (
    "torch",
    "pyzmq",
    "msgpack",
    "numpy",
    "opencv-python-headless",
    "python-osc",
    "mlflow",
    "hydra-core",
    "vizdoom",
)
COARSE_CLOCK_MS = 2.0
MARKS = {"ok": ("✓", "green"), "note": ("–", "yellow"), "bad": ("✗", "bold red")}
PLAIN_MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}  # for encodings without those, e.g. of files on Windows


@dataclass(frozen=True)
class Finding:
    """One check's result: ok, note (works, but worth knowing) or bad, and what to do."""

    verdict: str
    what: str


def doctor(overrides: list[str], key_file: Path | None = None, named_by_word: bool = False) -> int:
    """Check everything and print the findings; return 1 if anything is bad.

    Args:
        overrides: of the configuration.
        key_file: gives the credentials, and the hub unless an override does.
        named_by_word: whether the key file was named on the command line: then AMI_HUB does not apply to services.
    """
    config = load_config(overrides)
    console = Console(highlight=False)
    console.print(Text(f"experiment {config.name} on {platform.node()}", style="bold"))
    hub = HubAddress.parse(config.hub)
    if key_file:
        key = KeyFile.load(key_file)
        heeds_environment = not named_by_word or key.role in ("operator", "observer")
        named = (heeds_environment and "AMI_HUB" in os.environ) or any(word.startswith("hub=") for word in overrides)
        hub = (hub if named else HubAddress.parse(key.hub)).with_credentials(key.credentials)
    marks = MARKS if can_encode("✓✗", console.encoding) else PLAIN_MARKS
    bad = 0
    for check in (
        check_versions,
        check_devices,
        check_doors,
        partial(check_hub, hub=hub),
        check_disk,
        check_priority,
        check_camera,
        check_video,
        check_osc,
        check_mlflow,
    ):
        for finding in check(config):
            bad += finding.verdict == "bad"
            console.print(Text.assemble(" ", marks[finding.verdict], " ", finding.what), soft_wrap=True)
    console.print("all is well" if not bad else f"{bad} to fix")
    return 1 if bad else 0


def can_encode(text: str, encoding: str) -> bool:
    """Return whether an encoding has all characters of a text."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def check_versions(config: DictConfig) -> Iterator[Finding]:
    """Check Python, and the packages that the services need."""
    version = platform.python_version()
    if (tick_ms := time.get_clock_info("monotonic").resolution * 1e3) > COARSE_CLOCK_MS:
        coarse = f"this Python's clock has a resolution of {tick_ms:.1f} ms, by which a body's steps are late"
        yield Finding("note", f"{coarse}: on Windows use Python 3.13 or newer")
    yield Finding("ok" if sys.version_info >= (3, 11) else "bad", f"Python {version} (3.11 or newer is needed)")
    installed, absent = [], []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    yield Finding("ok", ", ".join(installed))
    yield from map(partial(Finding, "bad"), filter(None, map(loading_trouble, ("torch", "cv2"))))
    if absent:
        yield Finding(
            "note",
            f"not installed here: {', '.join(absent)}; fine if those services run elsewhere, else install them",
        )
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    both = names & {"opencv-python", "opencv-python-headless"}
    if len(both) > 1:
        yield Finding("bad", "opencv-python and opencv-python-headless are both installed: pip uninstall opencv-python")


def loading_trouble(module: str) -> str | None:
    """Import a module in a process of its own; return why that fails, None if it does not or is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = next((remedy for code, remedy in NOT_LOADED.items() if f"WinError {code}]" in why), "install it again")
    return f"{module} cannot be loaded ({why:.300}): {remedy}"


def check_devices(config: DictConfig) -> Iterator[Finding]:
    """Check that the configured devices exist."""
    keys = ("inference.device", *(f"trainers.{name}.device" for name in config.trainers))
    wanted = {key: name for key in keys if (name := OmegaConf.select(config, key, default="cpu")) != "cpu"}
    if not wanted or importlib.util.find_spec("torch") is None:
        return
    from ami_shared.models.device import usable_device

    for key, name in wanted.items():
        try:
            yield Finding("ok", f"{key}: {usable_device(name, key)}")
        except OSError:
            return  # torch cannot be loaded, as was said
        except AmiError as error:
            yield Finding("note", f"{error}; fine if that service runs elsewhere")


def check_doors(config: DictConfig) -> Iterator[Finding]:
    """Check that a controller of this configuration may listen at its address, and has its keys."""
    doors = config.controller
    try:
        if not can_bind(doors.bind, 0, socket.SOCK_STREAM):
            return
        check_bind_address(doors.bind, doors.key_folder, doors.insecure)
        if doors.key_folder is not None:
            KeyFolder(Path(doors.key_folder)).hub()
    except AmiError as error:
        yield Finding("bad", str(error))


def check_hub(config: DictConfig, hub: HubAddress) -> Iterator[Finding]:
    """Check that a controller answers at the hub, or that the ports are free if it would be on this machine."""
    try:
        with Client(hub) as client:
            status = client.status(timeout_s=1.5)
        yield Finding("ok", f"a controller answers at {hub}: {status['system']}")
        return
    except (JoinRefusedError, CommandFailedError) as error:
        known = hub.credentials is not None
        yield Finding("bad", str(error)) if known else Finding("note", f"a hub with keys is at {hub}: add --join FILE")
        return
    except AmiError:
        pass
    if not can_bind(hub.host, 0, socket.SOCK_STREAM):
        remedy = "start it there with keys and controller.bind=0.0.0.0 (docs/deployment.md), and let its firewall pass"
        ports = f"ports {hub.port} to {hub.port + len(Port) - 1}"
        yield Finding("bad", f"no controller answers at {hub}, another machine or none: {remedy} {ports}")
        return
    if not can_bind(config.controller.bind, 0, socket.SOCK_STREAM):
        yield Finding(
            "bad", f"controller.bind={config.controller.bind} is not an address of this machine: set 127.0.0.1"
        )
        return
    taken = [
        str(hub.port + port.value)
        for port in Port
        if not can_bind(config.controller.bind, hub.port + port.value, socket.SOCK_STREAM)
    ]
    if taken:
        yield Finding("bad", f"port {', '.join(taken)} is taken by something else: end it, or choose hub=host:port")
    else:
        yield Finding("ok", f"ports {hub.port} to {hub.port + len(Port) - 1} are free, no controller is running")


def can_bind(host: str, port: int, kind: socket.SocketKind) -> bool:
    """Return whether a socket can be bound there; with port 0, whether the host is this machine at all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    host = "0.0.0.0" if host == "*" else host
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM and os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError, UnicodeError):
            return False
    return True


def check_disk(config: DictConfig) -> Iterator[Finding]:
    """Check that the run's directory, and that of its checkpoints, can be written to and have room."""
    run_dir, checkpoints = Path(config.run_dir).absolute(), Path(config.checkpoint.directory).absolute()
    yield check_folder("run_dir", run_dir)
    if not checkpoints.is_relative_to(run_dir) or checkpoints.exists():
        yield check_folder("checkpoint.directory", checkpoints)


def check_folder(key: str, folder: Path) -> Finding:
    """Check that a folder exists or can be made, can be written to, and has room."""
    existing = next(there for there in (folder, *folder.parents) if there.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("bad", f"{existing} cannot be written to: set {key}=")
    free = shutil.disk_usage(existing).free
    verdict = "ok" if free > MONTHS_DISK_BYTES else "note" if free > LEAST_DISK_BYTES else "bad"
    advice = f"{MONTHS_DISK_BYTES / 1e9:.0f} GB are advised for three months"
    return Finding(verdict, f"{key} {folder}: {free / 1e9:.0f} GB free ({advice})")


def check_priority(config: DictConfig) -> Iterator[Finding]:
    """Check that training can be kept from delaying the body, and that other programs can be, too."""
    if hasattr(os, "SCHED_IDLE"):
        yield Finding("ok", f"{usable_cores()} cores; trainers run at idle priority")
    else:
        yield Finding(
            "note",
            f"{usable_cores()} cores; no idle priority on {platform.system()}: trainers run with a weaker share",
        )
    wanted = loop_priority(config)
    with ThreadPoolExecutor(1) as a_thread:
        got = a_thread.submit(set_thread_priority, wanted).result()
    if got == wanted:
        yield Finding("ok", f"the body's loop runs at {got} priority")
    else:
        yield Finding(
            "note",
            f"the body's loop runs at {got} priority, for {wanted} priority is not permitted here: steps may be some "
            f"milliseconds late where other programs are busy (docs/deployment.md says how to permit it)",
        )


def check_camera(config: DictConfig) -> Iterator[Finding]:
    """Check that the experiment's camera delivers, and list the cameras found."""
    sensor = OmegaConf.select(config, "inference.environment.sensor")
    if not isinstance(sensor, DictConfig) or "camera" not in sensor:
        return
    camera = sensor.camera
    if trouble := world_trouble(config):
        yield Finding("bad", trouble)
        return
    if isinstance(camera, str) and config.world is not None and is_shown_by_world(camera, config):
        yield from check_world(config)
        return
    if importlib.util.find_spec("cv2") is None:
        yield Finding("note", "opencv is not installed here: the camera was not checked")
        return
    others = [] if isinstance(camera, str) else [other for other in range(6) if other != camera]
    there = [found for verdict, found in map(probe_camera, others) if verdict == "ok"]
    if camera is None:
        key = "inference.environment.sensor.camera"
        todo = "start OBS's virtual camera, then set" if not there else "set"
        yield Finding("bad", f"no camera is chosen: {todo} {key} to the index of OBS's, or to a URL")
    else:
        yield Finding(*probe_camera(camera))
    for found in there:
        yield Finding("note", f"there is another: {found}" if camera is not None else f"there is: {found}")


def world_trouble(config: DictConfig) -> str:
    """Return what is wrong with the section `world`, if its package is installed to check that."""
    if config.world is not None and importlib.util.find_spec("ami_world") is not None:
        from ami_world.settings import settings_from

        try:
            settings_from(OmegaConf.to_container(config.world))  # type: ignore[arg-type]
        except AmiError as error:
            return str(error)
    return ""


def is_shown_by_world(camera: str, config: DictConfig) -> bool:
    """Return whether a camera's URL is that of the simulated world's picture."""
    try:
        url = urllib.parse.urlsplit(camera)
        return (url.hostname, url.port) == (config.world.http_host, config.world.http_port)
    except ValueError:
        return False


def probe_camera(camera: int | str) -> tuple[str, str]:
    """Open a camera in a separate process (drivers may hang), and read one frame."""
    code = (
        "import ast, os, sys, cv2; source = ast.literal_eval(sys.argv[1]); "
        "api = cv2.CAP_DSHOW if os.name == 'nt' and isinstance(source, int) else cv2.CAP_ANY; "
        "api = cv2.CAP_V4L2 if str(source).startswith('/dev/') else api; "
        "c = cv2.VideoCapture(source, api); ok, f = c.read(); "
        "print(f.shape[1], f.shape[0]) if ok else sys.exit(1)"
    )
    shown = f"camera {without_passwords(repr(camera))}"
    try:
        done = subprocess.run([sys.executable, "-c", code, repr(camera)], capture_output=True, timeout=8, check=True)
    except subprocess.TimeoutExpired:
        return "bad", f"{shown} hangs: is another program using it?"
    except subprocess.CalledProcessError:
        key = "inference.environment.sensor.camera"
        return "bad", f"{shown} delivers nothing: start OBS's virtual camera, or set {key}"
    return "ok", f"{shown} delivers {'x'.join(done.stdout.decode().split())} pixels"


def check_world(config: DictConfig) -> Iterator[Finding]:
    """Check that the simulated world runs, or could."""
    host, port, osc = config.world.http_host, config.world.http_port, config.world.osc_port
    if get_page(f"http://{host}:{port}/state", timeout_s=1.5) is None:
        yield Finding("ok", f"the simulated world shows itself at http://{host}:{port}/")
        return
    yield _port_finding("the world's picture", "world.http_port", can_bind(host, port, socket.SOCK_STREAM), port)
    yield _port_finding(
        "the world's OSC", "world.osc_port", can_bind(config.world.osc_host, osc, socket.SOCK_DGRAM), osc
    )


def _port_finding(use: str, key: str, free: bool, port: int) -> Finding:
    if free:
        return Finding("ok", f"port {port} for {use} is free")
    return Finding("bad", f"port {port} for {use} is taken: end what uses it, or set {key}=")


def check_video(config: DictConfig) -> Iterator[Finding]:
    """Check that recorded videos are where the configuration says."""
    path = OmegaConf.select(config, "inference.environment.sensor.path")
    if path is not None and not Path(path).exists():
        yield Finding("bad", f"{path} does not exist: put videos there, or set inference.environment.sensor.path")


def check_osc(config: DictConfig) -> Iterator[Finding]:
    """Check that OSC can be sent to its target, which never answers."""
    actuator = OmegaConf.select(config, "inference.environment.actuator")
    if not isinstance(actuator, DictConfig) or "port" not in actuator:
        return
    try:
        check_target(actuator.get("host"), actuator.port)
        _, (address, port) = resolve(actuator.host, actuator.port, 0.0)
    except AmiError as error:
        yield Finding("bad", str(error))
        return
    yield Finding("ok", f"OSC goes to {address}:{port} (VRChat never answers: enable OSC in its action menu)")


def check_mlflow(config: DictConfig) -> Iterator[Finding]:
    """Check that MLflow can store the learning record."""
    if importlib.util.find_spec("mlflow") is None:
        yield Finding("note", "mlflow is not installed here: it is needed where the controller runs")
        return
    uri = config.tracker.uri
    if uri is None or not uri.startswith("http"):
        where = without_passwords(uri) if uri else sqlite_uri(Path(config.run_dir) / "mlflow.db")
        yield Finding("ok", f"MLflow writes to {where}: mlflow server --backend-store-uri {where} shows it")
        return
    shown = without_passwords(uri)
    if trouble := get_page(f"{uri.rstrip('/')}/health", timeout_s=3.0):
        yield Finding("bad", f"MLflow at {shown} does not answer ({trouble}): start it, or set tracker.uri=null")
    else:
        yield Finding("ok", f"MLflow answers at {shown}")


def get_page(url: str, timeout_s: float) -> str | None:
    """Get a page of a server, as the user that its URL names; return why that is impossible, None if it is possible."""
    try:
        parts = urllib.parse.urlsplit(url)
        account, _, place = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=place).geturl())
        if account:
            user, _, password = map(urllib.parse.unquote, account.partition(":"))
            request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except http.client.HTTPException as error:
        return f"what listens there speaks no HTTP: {type(error).__name__}"
    except ValueError:
        return "not a valid address"
    except OSError as error:
        return str(error)
    return None
