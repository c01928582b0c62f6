"""`ami up`: runs every service of an experiment as a child process, with one log, until Ctrl-C or `ami shutdown`."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ami_controller.cli.client import Client
from ami_controller.cli.log_view import LogView
from ami_controller.cli.render import duration, number, troubles
from ami_controller.cli.supervision import Supervision
from ami_controller.coordinator import SHUTDOWN_S
from ami_controller.key_folder import KeyFolder
from ami_controller.places import prepare_run_dir
from ami_shared.bus import HubAddress
from ami_shared.clock import Every
from ami_shared.command import END, LAUNCH, StopFlag, watch_signals
from ami_shared.config import load_config
from ami_shared.errors import AmiError, ConfigurationError, NoControllerError
from ami_shared.files import lock_folder
from ami_shared.keys import KeyFile
from ami_shared.process import own_group

OPERATOR = "local-operator"
ASKING_S = 20.0  # for the controller to answer when everything is to end
MOST_TRIES = 3  # if it dies in each
END_S = 15.0  # for services to end, even at idle priority
WRITING_S = 120.0  # for the controller to write large parameters at the end
SUMMARY_INTERVAL_S = 60.0


@dataclass(frozen=True)
class Service:
    """A service to run: its name in the log, and its command."""

    name: str
    command: list[str]


def services_of(config: DictConfig, overrides: list[str]) -> list[Service]:
    """Return the services of an experiment, in the order of their start."""
    given = [word for word in overrides if not word.startswith("trainer=")]
    keys = KeyFolder(Path(config.controller.key_folder)) if config.controller.key_folder else None

    def service(name: str, module: str, *more: str, role: str | None = None) -> Service:
        key = [f'join="{keys.local(name, role).resolve()}"'] if keys and role else []
        return Service(name, [sys.executable, "-m", module, *given, *more, *key])

    services = [service("controller", "ami_controller.main")]
    if config.world is not None:
        services.append(service("world", "ami_world.main"))
    services.append(service(config.inference.name, "ami_inference.main", role="body"))
    services += [service(name, "ami_trainer.main", f"trainer={name}", role="trainer") for name in config.trainers]
    return services


class Up:
    """Starts, watches, restarts and ends the services."""

    def __init__(self, config: DictConfig, services: list[Service], view: LogView) -> None:
        self._services = {service.name: service for service in services}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._supervision = Supervision()
        self._view = view
        self._hub = own_hub(config, view)
        self._launch = secrets.token_hex(8)
        self._saves_at_end = bool(config.checkpoint.at_shutdown)

    def run(self, stop: StopFlag) -> int:
        """Run until the end; return the exit code."""
        for name in self._services:
            self._start(name)
        threading.Thread(target=self._summarise, args=(stop,), name="summary", daemon=True).start()
        code = None
        while code is None and not stop.is_set():
            code = self._look_after()
        if code is None:
            self._view.line("ami", "INFO ending everything (a second Ctrl-C ends it at once)")
            code = 0
        if code == 0:
            code = self._let_it_save()
        self._supervision.ending = True
        stop.set()
        return self._end(code)

    def end_at_once(self) -> None:
        """Let the services end without a save, whatever is under way."""
        for process in list(self._processes.values()):
            ask_to_end(process)

    def _start(self, name: str) -> None:
        environment = {**os.environ, "AMI_SUPERVISED": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        environment[LAUNCH] = self._launch
        environment.pop("AMI_JOIN", None)  # an operator's: these services get their own keys, or need none
        self._supervision.started(name, time.monotonic())
        process = subprocess.Popen(
            self._services[name].command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            **own_group(),
        )
        self._processes[name] = process
        threading.Thread(target=self._follow, args=(name, process), name=f"log {name}", daemon=True).start()

    def _follow(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Show what a child prints until it ends."""
        reader = threading.Thread(target=self._read_output, args=(name, process), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(timeout=1.0)  # a grandchild may keep the pipe open longer
        self._ended.put((name, code))

    def _read_output(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.decode(errors="replace").rstrip():
                self._view.line(name, text)

    def _look_after(self) -> int | None:
        """Restart who is due, and handle one child's end; return the exit code when everything should end."""
        for name in self._supervision.due(time.monotonic()):
            self._view.line("ami", f"INFO starting {name} again")
            try:
                self._start(name)
            except OSError as error:  # too little memory, or too many processes
                self._ended.put((name, AmiError.exit_code))
                self._view.line("ami", f"ERROR {name} could not be started ({error.strerror})")
        try:
            name, code = self._ended.get(timeout=0.1)
        except queue.Empty:
            return None
        verdict = self._supervision.ended(name, code, time.monotonic())
        if verdict.exit_code == ConfigurationError.exit_code:
            self._view.line("ami", f"ERROR {name} cannot run as configured: ending everything")
        elif verdict.exit_code:
            self._view.line("ami", "ERROR the controller died while the system ended: ending everything")
        if verdict.displaced:
            self._view.line("ami", f"WARNING {name} stays down; run `ami up` again to start it")
        if verdict.delay_s is not None:
            what = f"{name} {describe_exit(code)}; starting it again in {verdict.delay_s:g} s"
            self._view.line("ami", f"WARNING {what}")
        return verdict.exit_code

    def _end(self, code: int) -> int:
        """End what still runs: ask each process, then kill."""
        running = {name: process for name, process in self._processes.items() if process.poll() is None}
        controller = running.pop("controller", None)
        stubborn = end_processes(running, time.monotonic() + END_S)
        if controller is not None:
            stubborn += end_processes({"controller": controller}, time.monotonic() + WRITING_S)
        for name in stubborn:
            self._view.line("ami", f"WARNING {name} did not end in time and was killed")
        if code == 0:
            self._view.line("ami", "INFO everything has ended")
        return 1 if stubborn and code == 0 else code

    def _let_it_save(self) -> int:
        """Have the system save and end, unless it never ran as a whole or has ended by itself; return the exit code.

        Who dies meanwhile is started again: a save needs every service.
        """
        controller = self._processes.get("controller")
        ended = controller is not None and controller.poll() == 0
        if ended or not (self._saves_at_end and self._supervision.whole):
            return 0
        self._view.line("ami", "INFO saving before the end")
        asking = threading.Thread(target=self._ask_to_end, name="asking", daemon=True)
        asking.start()
        while asking.is_alive():
            code = self._look_after()
            if code and self._supervision.stays_down("controller"):
                return code  # nobody is left to ask
        return 0

    def _ask_to_end(self) -> None:
        if trouble := self._save_and_end():
            self._view.line("ami", f"WARNING {trouble}")

    def _save_and_end(self) -> str | None:
        """Have the system save and end; return what went wrong.

        A controller that is busy, starting, or about to be restarted is asked again.
        """
        deadline, tries = time.monotonic() + ASKING_S, MOST_TRIES
        while True:
            if self._supervision.stays_down("controller"):
                return "ending without a save: the controller is not running"
            found = False
            try:
                with Client(self._hub) as client:
                    if not self._is_own(client.status()):
                        return f"ending without a save: another system's controller answers at {self._hub}"
                    found = True
                    client.command("shutdown", SHUTDOWN_S)
                return None
            except NoControllerError as error:
                if found:  # it died meanwhile
                    deadline, tries = time.monotonic() + ASKING_S, tries - 1
                if not tries or time.monotonic() > deadline:
                    return f"ending without a save: {error}"
            except AmiError as error:
                return str(error)

    def _is_own(self, status: Mapping[str, Any]) -> bool:
        """Return whether the controller that answers was started here: another may have the address."""
        return bool(status["hub"].get("launch") == self._launch)

    def _summarise(self, stop: StopFlag) -> None:
        """Log a summary, once when everything runs and then once a minute."""
        due = Every(SUMMARY_INTERVAL_S, now=time.monotonic())
        announced = False
        while not stop.wait(0.5):
            if announced and not due.due(time.monotonic()):
                continue
            try:
                with Client(self._hub) as client:
                    status = client.status(timeout_s=1.0)
            except (AmiError, OSError, LookupError, TypeError, ValueError):
                continue  # a summary must not end the system
            if self._is_own(status) and (announced or status["system"] in ("running", "paused")):
                announced = self._supervision.whole = True
                self._view.line("ami", f"INFO {summary(status)}")


def own_hub(config: DictConfig, view: LogView) -> HubAddress:
    """Return the hub with this command's credentials: if the hub has keys, those of an operator on this machine."""
    hub = HubAddress.parse(config.hub)
    if config.controller.key_folder is None:
        return hub
    path = KeyFolder(Path(config.controller.key_folder)).local(OPERATOR, "operator")
    key = KeyFile.load(path)
    elsewhere = f" --hub {hub}" if HubAddress.parse(key.hub) != hub else ""
    view.line("ami", f"INFO the hub has keys; on this machine: ami status --join {path}{elsewhere}")
    return hub.with_credentials(key.credentials)


def summary(status: Mapping[str, Any]) -> str:
    """Return the whole system in one line."""
    parts = [status["system"]]
    for service in status["services"]:
        if service["state"] in ("absent", "lost"):
            parts.append(f"{service['name']} {service['state']}")
        elif service["role"] == "body":
            parts.append(f"{service['name']} {service['rate_hz']:.1f} steps/s, {service['late_ticks']} late")
        elif service["role"] == "trainer":
            error = service["fresh_error"] or {}
            learned = f", fresh error {number(error['first'])} → {number(error['now'])}" if error.get("now") else ""
            parts.append(f"{service['name']} {service['rate_hz']:.1f} updates/s{learned}")
    parts += [f"{model['name']} v{model['version']}" for model in status["models"]]
    parts.append(f"up {duration(status['hub']['uptime_s'])}")
    return " · ".join(parts + troubles(status)[:2])


def describe_exit(code: int) -> str:
    """Return an exit code in words."""
    with contextlib.suppress(ValueError):
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        if code > 128:
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


def end_processes(processes: Mapping[str, subprocess.Popen[bytes]], deadline: float) -> list[str]:
    """Ask processes to end, wait, then kill; return the names of those that had to be killed."""
    for process in processes.values():
        if os.name != "nt":
            process.terminate()
        ask_to_end(process)
    stubborn = []
    for name, process in processes.items():
        try:
            process.wait(timeout=max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stubborn.append(name)
            process.kill()
            process.wait()
    return stubborn


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Ask a service for an orderly end, on every platform."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it is gone, or was asked before
        process.stdin.write(END)
        process.stdin.close()


def up(overrides: list[str]) -> int:
    """Run the experiment until Ctrl-C or `ami shutdown`; return the exit code."""
    config = load_config(overrides)
    run_dir = prepare_run_dir(Path(config.run_dir))
    lock_folder(run_dir, "controller").close()  # another one's log is not to be written to
    services = services_of(config, overrides)
    if len({service.name for service in services}) < len(services):
        raise ConfigurationError("two services of this experiment have one name: change inference.name")
    stop = StopFlag()
    view = LogView([service.name for service in services] + ["ami"], run_dir / "up.log")
    view.line("ami", f"INFO experiment {config.name}: {', '.join(s.name for s in services)}; run_dir {run_dir}")
    try:
        system = Up(config, services, view)
        watch_signals(stop, system.end_at_once)
        return system.run(stop)
    finally:
        view.close()
