"""One Compose project under a name and on ports of its own, seen as its users see it: `ami`, HTTP, `docker`."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
AMI = Path(sys.executable).with_name("ami")
PORTS = ("AMI_HUB_PORT", "AMI_WORLD_PORT", "AMI_MLFLOW_PORT")

Seen = TypeVar("Seen")


def poll_for(what: str, look: Callable[[], Seen], timeout_s: float) -> Seen:
    """Look again and again until something is seen; fail with what was waited for and the last trouble."""
    deadline = time.monotonic() + timeout_s
    trouble = "it did not come"
    while time.monotonic() < deadline:
        try:
            if seen := look():
                return seen
        except (OSError, ValueError, LookupError, AssertionError, subprocess.SubprocessError) as error:
            trouble = f"{type(error).__name__}: {error}"
        time.sleep(0.2)
    raise AssertionError(f"waited {timeout_s:g} s in vain for {what} ({trouble})")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def can_give_rtprio() -> bool:
    """Whether this Docker may let a container's threads be real-time, which rootless and restricted ones may not."""
    command = ["docker", "run", "--rm", "--ulimit", "rtprio=1", "python:3.11-slim-bookworm", "true"]
    return shutil.which("docker") is not None and subprocess.run(command, capture_output=True).returncode == 0


class Stack:
    """The containers of one project; use it as a context manager."""

    def __init__(self, project: str, **variables: str) -> None:
        self._project = project
        self._ports = {name: free_port() for name in PORTS}
        self._environment = {**os.environ, **{name: str(port) for name, port in self._ports.items()}, **variables}
        for name in ("COMPOSE_PROFILES", "COMPOSE_FILE", "AMI_OVERRIDES"):
            self._environment.pop(name, None)
        self.last_status: dict[str, Any] = {}
        self._keys = tempfile.TemporaryDirectory()
        self._compose = ["docker", "compose"]
        if subprocess.run([*self._compose, "version"], capture_output=True).returncode:
            assert shutil.which("docker-compose"), "neither `docker compose` nor `docker-compose` is there"
            self._compose = ["docker-compose"]
            self._environment |= {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}

    def __enter__(self) -> Stack:
        self.remove()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
        self._keys.cleanup()

    def compose(self, *arguments: str) -> None:
        """Run Compose with its output shown."""
        command = [*self._compose, "-p", self._project, *arguments]
        print(f"\n$ {' '.join(command)}", flush=True)
        subprocess.run(command, cwd=ROOT, env=self._environment, check=True)

    def ami(self, *arguments: str) -> str:
        """Run `ami` on the host, with the operator's key; return its output."""
        key = Path(self._keys.name) / "me.key.json"
        if not key.exists():
            controller = next(name for name in self.containers() if name.startswith("controller"))
            key.write_text(self.execute(controller, "cat", "/key/key.json"))
            key.chmod(0o600)
        command = [str(AMI), *arguments, "--hub", f"127.0.0.1:{self._ports['AMI_HUB_PORT']}", "--join", str(key)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"`ami {' '.join(arguments)}` ended with {done.returncode}: {done.stderr.strip()}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        self.last_status = dict(json.loads(self.ami("status", "--json")))
        return self.last_status

    def world(self) -> dict[str, Any]:
        """Return the world's /state."""
        return self._fetch("AMI_WORLD_PORT", "/state")

    def mlflow(self, path: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask MLflow's REST interface."""
        return self._fetch("AMI_MLFLOW_PORT", f"/api/2.0/mlflow/{path}", question)

    def _fetch(self, port: str, path: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if question is None else json.dumps(question).encode()
        url = f"http://127.0.0.1:{self._ports[port]}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return dict(json.load(answer))

    def containers(self) -> dict[str, dict[str, Any]]:
        """Return what `docker inspect` says, by service, without the one that makes keys and ends."""
        label = f"label=com.docker.compose.project={self._project}"
        ids = self._docker("ps", "-aq", "--filter", label).split()
        details = json.loads(self._docker("inspect", *ids)) if ids else []
        found = {about["Config"]["Labels"]["com.docker.compose.service"]: about for about in details}
        return {service: about for service, about in found.items() if service != "keys"}

    def execute(self, service: str, *command: str) -> str:
        """Run a command in a service's container; return its output."""
        return self._docker("exec", self.containers()[service]["Id"], *command)

    def kill_everything(self) -> None:
        """kill -9 of every container."""
        self._docker("kill", *(about["Id"] for about in self.containers().values()))

    def _docker(self, *arguments: str) -> str:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"`docker {' '.join(arguments)}`: {done.stderr.strip()}"
        return done.stdout.strip()

    def show_logs(self) -> None:
        """Print the end of each container's log, and the system's status."""
        for service, about in self.containers().items():
            state = about["State"]
            health = state.get("Health", {}).get("Status", "no health check")
            print(f"\n--- {service}: {state['Status']}, exit code {state['ExitCode']}, {health}", flush=True)
            subprocess.run(["docker", "logs", "--tail", "40", about["Id"]], stderr=subprocess.STDOUT)

    def remove(self) -> None:
        """Remove containers, networks and volumes."""
        self.compose("--profile", "simulated", "--profile", "vrchat", "down", "-v", "--remove-orphans")
        for key in Path(self._keys.name).iterdir():
            key.unlink()
