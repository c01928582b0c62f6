"""The inference service: builds one body from the configuration, joins the system, and runs it."""

from __future__ import annotations

import gc
import logging
import time
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import zmq
from omegaconf import DictConfig

from ami_inference.experience import ExperienceSender
from ami_inference.interaction import Interaction
from ami_inference.lockstep import Lockstep
from ami_shared.checkpoint_part import CheckpointPart
from ami_shared.checkpoints import Cut
from ami_shared.clock import Grid, Rate
from ami_shared.command import StopFlag
from ami_shared.config import agreement, build, hub_of, load_config, loop_priority
from ami_shared.control import ControlLink, Hooks
from ami_shared.experience import FETCH
from ami_shared.gate import Gate
from ami_shared.hub_clock import HubClock
from ami_shared.membership import Identity
from ami_shared.memory import keep_freed_memory
from ami_shared.metrics import MetricsQueue
from ami_shared.models.device import gpu_statistics, told_when_full, usable_device
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.models.threads import start_torch_threads
from ami_shared.priority import set_thread_priority
from ami_shared.process import process_statistics
from ami_shared.snapshots import SNAPSHOT
from ami_shared.state import Tree
from ami_shared.wire import Message

log = logging.getLogger(__name__)

FIRST_SNAPSHOT_PATIENCE_S = 10.0
REPEAT_PATIENCE_S = 3.0
ONLY_BODY = "body"  # the name of the only body of a system


class Body:
    """All parts of one inference service, wired together."""

    def __init__(self, config: DictConfig) -> None:
        """Build all parts; nothing is started.

        Args:
            config: the whole configuration, with this body's own world in `inference.environment`.
        """
        self._pool = start_torch_threads(config.inference.torch_threads)
        torch.manual_seed(config.seed)
        self.gate, self.clock = Gate(), HubClock()
        self.metrics = MetricsQueue(clock=self.clock)
        self.identity = Identity(config.inference.name, "body", agreement(config), take_over=config.take_over)
        hub, context = hub_of(config, "body", config.inference.name), zmq.Context()
        self._context = context
        followed = config.inference.agent.get("models", [])
        device = usable_device(config.inference.device, "inference.device")
        modules = {name: build(config.models[name], f"models.{name}").to(device) for name in followed}
        self.replicas = Replicas(modules, self.clock, patient=config.pace == "lockstep")
        self.lockstep: Lockstep | None = None
        me, retained_bytes = self.identity, config.inference.retained_mb * 1_000_000
        self.sender = ExperienceSender(context, hub, me.name, me.incarnation, retained_bytes)
        if config.pace == "lockstep":
            waited_for = (config.lockstep_window, list(config.trainers), self.identity.incarnation)
            self.lockstep = Lockstep(*waited_for, self.gate, self.sender, self.replicas)
        on_settled = self.lockstep.heard if self.lockstep else None
        self.receiver = ParameterReceiver(context, hub, self.replicas, list(modules), on_settled)
        hooks = Hooks(self.statistics, self._on_message, self._on_versions, self._loop_moved_at)
        self.environment = build(config.inference.environment, "inference.environment")
        agent_section = {key: value for key, value in config.inference.agent.items() if key != "models"}
        agent = build(
            agent_section,
            "inference.agent",
            replicas=self.replicas,
            choices=self.environment.choices,
            seed=own_seed(config),
        )
        interval_s = config.inference.interval if config.pace == "realtime" else 0.0
        self.interaction = Interaction(
            self.environment,
            agent,
            self.replicas,
            self.lockstep or self.sender,
            self.gate,
            self.lockstep or Grid(interval_s, self.clock, config.inference.lateness_tolerance),
            self.clock,
            self.metrics.put,
            config.tracker.metrics_interval,
            self._on_cut,
        )
        self.link = ControlLink(context, hub, self.identity, self.gate, self.metrics, hooks, self.clock)
        self._part = CheckpointPart(me, self.link, self.interaction.wish_cut)
        self._partial, self._seamless = config.checkpoint.allow == "partial", config.checkpoint.seamless
        self._incarnation = me.incarnation
        self._priority = loop_priority(config)
        self._joined_at = 0.0
        self._living = False
        self._rate, self._waited = Rate(), Rate()

    def live(self) -> None:
        """Join, take over the newest parameters, and interact until asked to stop."""
        for thread in (self.link, self.receiver):
            thread.start()
        try:
            if self._begin():
                priority = set_thread_priority(self._priority, also=self._pool)
                log.info(
                    "body %s joined the system; acting every %g s; priority %s",
                    self.identity.name,
                    self.interaction.interval_s,
                    priority,
                )
                gc.collect()
                gc.freeze()
                self._living = True
                self.interaction.run()
            self.link.raise_if_refused()
        finally:
            self.gate.confirm("stopping", self.gate.desired)
            self._close_environment()
            self.sender.close()
            self.receiver.close()
            self.link.leave()
            self._context.destroy(linger=500)  # lets the last messages reach the hub

    def _close_environment(self) -> None:
        try:
            self.environment.close()
        except Exception as error:  # whatever a driver raises: the last records must be sent, and this body must leave
            log.error("the environment did not close: %s: %s", type(error).__name__, error)

    def _begin(self) -> bool:
        """Join, and restore state and parameters; return False if asked to stop meanwhile."""
        if not (self.link.wait_joined() and self._part.restore(self.gate, self._restore, self._partial)):
            return False
        self.sender.start()  # not earlier: a refused process must not send under the name of a living one
        return self._wait_for_parameters()

    def _restore(self, trees: Mapping[str, Tree]) -> None:
        folder = f"interaction/{self.identity.name}/"
        kept = {name.removeprefix(folder): tree for name, tree in trees.items()}
        self.interaction.restore_all(kept, self._seamless)
        self._rate = Rate()
        if self._seamless:
            self._incarnation = str(kept["stream"]["incarnation"])
            self.sender.go_on_as(self._incarnation, self.interaction.sequence)
            if self.lockstep:
                self.lockstep.go_on_as(self._incarnation, self.interaction.sequence)

    def _on_cut(self, cut: Cut, trees: Mapping[str, Tree]) -> None:
        folder, stream = f"interaction/{self.identity.name}/", {"incarnation": self._incarnation}
        self._part.taken(cut, {folder + name: tree for name, tree in {**trees, "stream": stream}.items()})

    def _wait_for_parameters(self) -> bool:
        """Wait, so that the first step is not taken with random weights while the system has learned ones."""
        self._joined_at = time.monotonic()
        deadline = self._joined_at + FIRST_SNAPSHOT_PATIENCE_S
        while missing := self.receiver.missing(self._awaited_versions()):
            if not self.gate.may_wait():
                return False
            if time.monotonic() > deadline:
                log.warning("still waiting for the parameters of %s from the controller", ", ".join(missing))
                deadline = time.monotonic() + FIRST_SNAPSHOT_PATIENCE_S
            time.sleep(0.02)
        return True

    def _awaited_versions(self) -> Mapping[str, int]:
        """Return the versions that the controller keeps; for a while also those that trainers will repeat to it."""
        repeating = time.monotonic() < self._joined_at + REPEAT_PATIENCE_S
        return self.link.version_floors if repeating else self.link.versions

    def _on_message(self, message: Message) -> None:
        if self._part.heard(message):
            return
        if message.kind == SNAPSHOT:
            self.receiver.take(message)
        elif message.kind == FETCH:
            self.sender.fetch(message)

    def _on_versions(self, newest: Mapping[str, int]) -> None:
        for question in self.receiver.questions(newest, self.clock.monotonic()):
            self.link.send(self.identity.message("get_parameters", question))

    def _loop_moved_at(self) -> float:
        if not self._living:
            return self.clock.monotonic()
        return max(self.interaction.moved_at, self.lockstep.moved_at if self.lockstep else 0.0)

    def _rate_hz(self) -> float:
        return self._rate.update(self.clock.monotonic(), self.interaction.steps)

    def _waiting(self) -> dict[str, float]:
        """Return the share of the last seconds in which this body waited for trainers; in lockstep only."""
        if self.lockstep is None:
            return {}
        return {"waiting_share": min(1.0, self._waited.update(self.clock.monotonic(), self.lockstep.waited_s))}

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of this body."""
        return {
            **process_statistics(),
            **gpu_statistics(),
            **self.interaction.statistics(),
            "rate_hz": self._rate_hz(),
            **self._waiting(),
            **self.sender.statistics(),
            "replicas": self.replicas.statistics(),
            **self.receiver.statistics(),
            "links": {
                "control": self.link.link.statistics(),
                "experience": self.sender.link.statistics(),
                "parameters": self.receiver.link.statistics(),
            },
        }


def own_seed(config: DictConfig) -> int:
    """Return the seed of this body's choices and environment: it differs between the bodies of a system."""
    name = config.inference.name
    return int(config.seed) if name == ONLY_BODY else zlib.crc32(f"{config.seed} {name}".encode())


def own_world(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the section of this body's environment, with the system's seed replaced by the body's own."""
    if own_seed(config) == config.seed:
        section: DictConfig = config.inference.environment
    else:
        section = load_config([*overrides, f"seed={own_seed(config)}"]).inference.environment
    return section


def serve(overrides: list[str], stop: StopFlag) -> None:
    """Run one body until `stop` is set or the system shuts down."""
    keep_freed_memory()
    with told_when_full("choose smaller models= or another inference.device="):
        config = load_config(overrides)
        config.inference.environment = own_world(config, overrides)
        body = Body(config)
        stop.on_set(body.gate.stop)
        stop.on_abandoned(body.link.end_with_controller)
        body.live()
