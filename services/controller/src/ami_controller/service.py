"""The controller service: binds the hub, keeps the run's state, and serves until the shutdown is complete."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
from omegaconf import DictConfig, OmegaConf

from ami_controller.authority import Authority
from ami_controller.checkpoint_files import CheckpointFolder, Found, Manifest
from ami_controller.checkpoint_writer import CheckpointWriter
from ami_controller.checkpointing import Checkpointing, Schedule
from ami_controller.coordinator import SHARE_FOR_SAVING, Coordinator
from ami_controller.doorkeeper import Doorkeeper, Security
from ami_controller.forwarders import Forwarder, make_forwarders, make_guarded_forwarders
from ami_controller.guarded_forwarder import GuardedForwarder
from ami_controller.hub import Router
from ami_controller.key_folder import KeyFolder, Peer
from ami_controller.lifecycle import Lifecycle
from ami_controller.mlflow_process import MLflowProcess
from ami_controller.parameter_files import ParameterFiles, ParameterKeeper
from ami_controller.parameter_store import ParameterStore
from ami_controller.places import check_bind_address, prepare_folder, prepare_run_dir
from ami_controller.registry import Registry
from ami_controller.restoring import check_fit, find, place_of, snapshots
from ami_controller.retention import Retention
from ami_controller.state import load_state, run_state_of, save_state, save_versions
from ami_controller.status import build_status
from ami_controller.tracker import Tracker
from ami_shared.bus import HubAddress
from ami_shared.clock import Every
from ami_shared.command import LAUNCH, StopFlag
from ami_shared.config import agreement, load_config, trainer_service
from ami_shared.errors import ConfigurationError
from ami_shared.files import lock_folder
from ami_shared.health import HealthFile, health_path
from ami_shared.keys import Pair
from ami_shared.links import LinkWatch, port_statistics
from ami_shared.memory import keep_freed_memory
from ami_shared.metrics import Curves
from ami_shared.process import process_statistics
from ami_shared.snapshots import Snapshot
from ami_shared.uris import sqlite_uri, without_passwords

log = logging.getLogger(__name__)

GOODBYE_S = 2.5  # how long to wait for goodbyes when nobody waits for the result
SAY_WHO_IS_LEFT_S = 15.0
SIGNAL_SAVE_S = 60.0  # how long to wait for a save when a signal asks for the end
RISE = 1_000  # versions that a run taken back leaves free for trainers that still publish the later state
IO_THREADS = 4  # with keys they encrypt, which takes longer than everything else


class Controller:
    """All parts of the controller, wired together."""

    def __init__(self, config: DictConfig) -> None:
        doors = config.controller
        self._saves_at_end = bool(config.checkpoint.at_shutdown)
        self._insecure = check_bind_address(doors.bind, doors.key_folder, doors.insecure)
        self._run_dir = prepare_run_dir(Path(config.run_dir))
        self._taken_back = False
        self._locks = [lock_folder(self._run_dir, "controller")]
        self._state = load_state(self._run_dir)
        self._expected = [config.inference.name, *config.trainers]
        self._checkpoints = CheckpointFolder(prepare_folder(Path(config.checkpoint.directory), "checkpoint.directory"))
        self._locks.append(self._checkpoints.lock())
        self._checkpoints.clear_litter()
        partial = config.checkpoint.allow == "partial"
        found = self._go_on_from(config, partial)
        files = ParameterFiles(self._run_dir / "parameters", agreement(config), partial)
        kept = files.load()
        if self._taken_back:
            self._rise_above(kept)
        self._saving = threading.Lock()  # the tracker's thread saves too
        self._state_trouble: str | None = None
        self._whole_due = True
        self._numbered = self._state.last_checkpoint
        address = HubAddress.parse(config.hub).at(config.controller.bind)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        self._security = security_of(config)
        self._router = Router(context, address, self._security)
        self._forwarders: Sequence[Forwarder | GuardedForwarder] = (
            make_guarded_forwarders(context, address, self._security) if self._security else make_forwarders(address)
        )
        self._doorkeeper = Doorkeeper(context, self._security, self._cut_off) if self._security else None
        own_host = "127.0.0.1" if address.host in ("0.0.0.0", "*") else address.host
        local = address.at(own_host).with_credentials(self._security.credentials if self._security else None)
        restored = self._restored_models(config, found, kept)
        if self._taken_back:
            files.write_all(restored)  # before the state records it: a restart must not find the later parameters
        self._store = ParameterStore(context, local, [*kept, *restored])
        written = {snapshot.model: snapshot.version for snapshot in kept}
        self._keeper = ParameterKeeper(files, self._store.all_newer_than, written)
        self._lifecycle = Lifecycle(self._state.paused, self._state.epoch)
        self._registry = Registry(agreement(config), self._state.lineage, time.monotonic())
        self._tracker = Tracker(self._run_dir, self._mlflow_run(config), config.tracker.write_interval)
        self._curves = Curves()
        self._started_at = time.monotonic()
        keep = config.checkpoint.keep
        retention = Retention(keep.newest, keep.hourly, keep.daily, keep.weekly)
        self._writer = CheckpointWriter(self._checkpoints, retention, self._router.wake)
        self._checkpointing = Checkpointing(
            self._checkpoints,
            self._writer,
            Schedule(config.checkpoint.interval, config.checkpoint.first_after, config.checkpoint.timeout),
            self._registry,
            self._expected,
            models_of(config),
            lambda: self._store.all_newer_than({}),
            self._state,
            without_passwords(OmegaConf.to_yaml(config)),
            self._tracker,
            found,
            self._started_at,
        )
        self._coordinator = Coordinator(
            self._registry,
            self._lifecycle,
            self._store,
            self._tracker,
            self._checkpointing,
            self._state.versions,
            self.status,
            self._remember,
            self._saves_at_end,
        )
        self.address = address
        self._health_due = Every(1.0, first_after_s=0.0)
        self._health = HealthFile(health_path(address.port, "controller", "controller"))
        self._save()
        if self._taken_back and self._state_trouble:  # the next start would take the run back again
            raise ConfigurationError(f"checkpoint={config.checkpoint.restore}: {self._state_trouble}")

    def _go_on_from(self, config: DictConfig, partial: bool) -> Found | None:
        """Find the checkpoint to continue from; take the run back to it if requested."""
        wish, begun_before = config.checkpoint.restore, (self._run_dir / "state.json").exists()
        state, folder = self._state, self._checkpoints
        if state.restored_from:  # an absolute path in runs that are older than the names
            before = folder.directory / state.restored_from
            own = folder.directory / before.name
            state.restored_from = place_of(folder, own if own.is_dir() and not before.is_dir() else before)
        found, taken_back_to = find(folder, wish, state.restored_from, state.restored_behind, state.last_checkpoint)
        if found is None:
            return None
        check_fit(found, agreement(config), self._expected, partial)
        log.info("continuing from checkpoint %s", found.manifest.name)
        if taken_back_to:
            then = run_state_of(found.manifest.run)
            if not begun_before:
                self._state = then.for_another_run()
            for model, version in versions_in(found.manifest).items():
                self._state.versions[model] = max(version, self._state.versions.get(model, 0)) + RISE
            self._state.lineage = secrets.token_hex(8)
            self._state.restored_from = taken_back_to
            self._state.restored_behind = self._checkpoints.last_number()
            self._taken_back = True
        return found

    def _rise_above(self, kept: Sequence[Snapshot]) -> None:
        """Make the restored models the newest: after a power cut, parameters may be newer than the state says."""
        versions = self._state.versions
        for snapshot in kept:
            if snapshot.model in versions:
                versions[snapshot.model] = max(snapshot.version + RISE, versions[snapshot.model])

    def _restored_models(self, config: DictConfig, found: Found | None, kept: list[Snapshot]) -> list[Snapshot]:
        """Return the checkpoint's models: all if the run is taken back, otherwise those that are the newest."""
        if found is None:
            return []
        on_disk = {snapshot.model: snapshot.version for snapshot in kept}
        saved = found.manifest.about.get("versions", {})

        def version_of(model: str) -> int:
            if self._taken_back:
                return self._state.versions.get(model, 0)
            return int(saved.get(model, 0)) if saved.get(model, 0) >= on_disk.get(model, 0) else 0

        return snapshots(found, agreement(config), version_of)

    def _mlflow_run(self, config: DictConfig) -> MLflowProcess:
        uri = config.tracker.uri
        local = uri is None
        if local:
            uri = sqlite_uri(self._run_dir / "mlflow.db")
        artifacts = self._run_dir / "artifacts" if local else None
        return MLflowProcess(
            uri,
            config.tracker.experiment,
            artifacts,
            agreement(config),
            self._state.mlflow_run,
            self._remember_run,
        )

    def serve(self, stop: StopFlag) -> None:
        """Serve until a shutdown is commanded or `stop` is set, and all services have left."""
        stop.on_set(self._router.wake)
        stop.on_abandoned(self._router.shut_down)
        if self._doorkeeper:
            self._doorkeeper.start()
        for forwarder in self._forwarders:
            forwarder.start()
        self._store.start()
        self._keeper.start()
        self._writer.start()
        self._tracker.start()
        log.info("controller at %s; everything is written to %s", self.address, self._run_dir.resolve())
        if self._lifecycle.desired.paused:
            log.warning("the system is paused, as before the restart: `ami resume` lets it continue")
        try:
            while not stop.is_set() and not self._lifecycle.desired.stopping:
                self._serve_once()
            if stop.signal:
                self._save_before_the_end()
            self._wait_for_goodbyes(stop)
        finally:
            self._close()

    def _serve_once(self) -> None:
        self._router.serve_once(self._coordinator)
        if self._state.last_checkpoint != self._numbered:
            self._remember()
        for forwarder in self._forwarders:
            forwarder.drain()
        if self._health_due.due(time.monotonic()):
            self._health.write("running", 0.0, True)
            if self._state_trouble:
                self._save()
            self._record_own_metrics(time.monotonic())

    def _save_before_the_end(self) -> None:
        """Save because a signal ends this controller, while the other services keep running."""
        if self._lifecycle.desired.stopping or not self._saves_at_end:
            return
        now = time.monotonic()
        trouble: str | None = self._checkpointing.begin(now, timeout_s=SHARE_FOR_SAVING * SIGNAL_SAVE_S)
        while not trouble and self._checkpointing.busy and time.monotonic() < now + SIGNAL_SAVE_S:
            self._serve_once()
        if not trouble:
            trouble = "the save takes too long" if self._checkpointing.busy else self._checkpointing.trouble
        if trouble:
            log.warning("ending without a save: %s", trouble)

    def _cut_off(self, revoked: list[Peer]) -> None:
        """Remove peers whose keys were revoked, and cut their connections."""
        self._router.cut_off(revoked)
        for forwarder in self._forwarders:
            if isinstance(forwarder, GuardedForwarder):
                forwarder.reopen()

    def _wait_for_goodbyes(self, stop: StopFlag) -> None:
        """Answer until the last service has left, or the shutdown's timeout is over; a signal cuts that short.

        A trainer at idle priority may need long for its goodbye while others keep the cores busy.
        """
        begun = time.monotonic()
        said = Every(SAY_WHO_IS_LEFT_S, first_after_s=GOODBYE_S, now=begun)
        while self._lifecycle.desired.stopping and (living := self._registry.living()):
            now = time.monotonic()
            if now >= begun + GOODBYE_S and (stop.is_set() or not self._lifecycle.under_way):
                break
            if said.due(now):
                log.info("waiting for %s to end", ", ".join(member.name for member in living))
            self._serve_once()
        self._lifecycle.give_up(time.monotonic())
        self._router.serve_once(self._coordinator)
        for member in self._registry.living():
            if self._lifecycle.desired.stopping:
                log.warning("%s did not end within %.0f s", member.name, time.monotonic() - begun)

    def _close(self) -> None:
        self._tracker.close()
        self._store.close()
        self._keeper.close()
        self._writer.close()
        self._router.close()
        for forwarder in self._forwarders:
            forwarder.close()
        if self._doorkeeper:
            self._doorkeeper.close()
        self._health.remove()
        log.info("controller ended")

    def status(self, now: float) -> dict[str, Any]:
        """Return the status of the whole system at a monotonic time."""
        state = self._lifecycle.system_state(self._registry.members.values(), self._expected)
        hub = {
            "address": str(self.address),
            "uptime_s": now - self._started_at,
            "run_dir": str(self._run_dir.resolve()),
            "launch": os.environ.get(LAUNCH, ""),
            "memory_bytes": process_statistics()["memory_bytes"],
            "security": "keys" if self._security else "INSECURE" if self._insecure else "loopback only",
            "refused": dict(self._security.refusals.count) if self._security else {},
            "keys_trouble": self._security.trouble if self._security else None,
            **self._router.statistics(),
            **self._links(),
            **self._store.statistics(),
            "parameters_trouble": self._keeper.trouble or self._state_trouble,
            "checkpoint": self._checkpointing.statistics(),
        }
        members = self._registry.members.values()
        return build_status(
            state, members, self._expected, hub, self._tracker.statistics(), self._store.versions(), now
        )

    def _links(self) -> dict[str, Any]:
        watches: dict[str, LinkWatch] = {"control": self._router.links}
        for forwarder in self._forwarders:
            inward, outward = forwarder.links
            watches |= {f"{forwarder.name}_in": inward, f"{forwarder.name}_out": outward}
        ports = port_statistics(watches)
        sums = {"links_made": "made", "links_lost": "lost", "handshakes_failed": "failed"}
        return {**{key: sum(of[name] for of in ports.values()) for key, name in sums.items()}, "ports": ports}

    def _record_own_metrics(self, now: float) -> None:
        """Record the hub's statistics, and how far each body's models lag behind."""
        if not self._curves.due(now):
            return
        status = self.status(now)
        lags = {model["name"]: {"lag": model["lag"]} for model in status["models"]}
        about = {"members": len(self._registry.living()), "models": lags, "tracker": status["tracker"]}
        when = time.time()
        points = self._curves.changed({**status["hub"], **about})
        self._tracker.put_points("controller", [(name, value, int(when), when) for name, value in points.items()])

    def _remember(self) -> None:
        """Save the state; wait for the disk only for a change of the lifecycle or a checkpoint, not for a version."""
        desired = self._lifecycle.desired
        changed = (self._state.paused, self._state.epoch) != (desired.paused, desired.epoch)
        changed |= self._state.last_checkpoint != self._numbered
        self._numbered = self._state.last_checkpoint
        self._state.paused, self._state.epoch = desired.paused, desired.epoch
        self._save(whole=changed)

    def _remember_run(self, run_id: str) -> None:
        self._state.mlflow_run = run_id
        self._save(whole=True)

    def _save(self, whole: bool = False) -> None:
        """Write the versions, or the whole state; if that failed before, the whole state is written again."""
        try:
            with self._saving:
                self._whole_due |= whole
                (save_state if self._whole_due else save_versions)(self._run_dir, self._state)
                self._whole_due = False
        except OSError as error:
            trouble = f"{self._run_dir} cannot be written ({error}): a restart would forget the pause and versions"
            if not self._state_trouble:
                log.error("%s", trouble)
            self._state_trouble = trouble
        else:
            self._state_trouble = None


def versions_in(manifest: Manifest) -> dict[str, int]:
    """Return the largest version of each model that a checkpoint knows of, be it from a trainer or from the hub."""
    told = dict(run_state_of(manifest.run).versions)
    for model, version in manifest.about.get("versions", {}).items():
        told[model] = max(int(version), told.get(model, 0))
    return told


def models_of(config: DictConfig) -> dict[str, list[str] | None]:
    """Return which models each trainer publishes; None if its configuration does not say."""
    return {name: trainer_service(config, name).publishes for name in config.trainers}


def security_of(config: DictConfig) -> Security | None:
    """Return the hub's keys and what they allow; None if none are configured.

    Raises:
        ConfigurationError: the folder has no keys, or cannot be read.
    """
    if config.controller.key_folder is None:
        return None
    folder, own = KeyFolder(Path(config.controller.key_folder)), Pair.new()
    published = {trainer: models or [] for trainer, models in models_of(config).items()}
    security = Security(folder, Authority([], published), own)
    security.look_again()
    return security


def serve(overrides: list[str], stop: StopFlag) -> None:
    """Run the controller until `stop` is set or the system was shut down."""
    keep_freed_memory()
    stop.on_abandoned(lambda: log.warning("who started this controller is gone: ending the whole system"))
    Controller(load_config(overrides)).serve(stop)
