"""The trainer service: builds one trainer from the configuration, joins the system, and trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import zmq
from omegaconf import DictConfig, OmegaConf

from ami_shared.checkpoint_part import CheckpointPart
from ami_shared.clock import Rate
from ami_shared.command import StopFlag
from ami_shared.config import agreement, build, hub_of, load_config, trainer_service
from ami_shared.control import ControlLink, Hooks
from ami_shared.errors import ConfigurationError
from ami_shared.gate import Gate
from ami_shared.hub_clock import HubClock
from ami_shared.membership import Identity
from ami_shared.memory import keep_freed_memory
from ami_shared.metrics import MetricsQueue
from ami_shared.models.device import gpu_statistics, told_when_full, uses_gpu
from ami_shared.models.parameters import all_finite, read_arrays
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.models.threads import start_torch_threads
from ami_shared.priority import set_thread_priority, thread_ids
from ami_shared.process import process_statistics, usable_cores
from ami_shared.snapshots import SNAPSHOT
from ami_shared.state import Restorable, Tree, copied, state_of
from ami_shared.wire import Message
from ami_trainer.data_parallel import Team, form_team, processes_here, share_with
from ami_trainer.intake import Intake
from ami_trainer.learned_before import LearnedBefore
from ami_trainer.lockstep import Lockstep
from ami_trainer.publishing import SnapshotPublisher
from ami_trainer.settings import naming
from ami_trainer.trainers.trainer import Trainer
from ami_trainer.training import Training

log = logging.getLogger(__name__)


class TrainerService:
    """All parts of one trainer service, wired together."""

    def __init__(self, config: DictConfig, team: Team | None = None) -> None:
        """Build all parts; live() runs them.

        Args:
            config: the composed configuration.
            team: the processes that share the minibatches, if torchrun has started several.
        """
        self._service = trainer_service(config, config.trainer)
        self.gate, self.clock = Gate(), HubClock()
        self.metrics = MetricsQueue(clock=self.clock)
        self.identity = Identity(config.trainer, "trainer", agreement(config), take_over=config.take_over)
        hub, context = hub_of(config, "trainer", config.trainer), zmq.Context()
        self._context = context
        window: int = config.lockstep_window if config.pace == "lockstep" else 0
        before = thread_ids()
        self.trainer = build_trainer(config, team)
        self._pool = thread_ids() - before
        if window:
            self.trainer.in_lockstep()
        check_publishes(config.trainer, self._service.publishes, self.trainer.published_models)
        self.publisher = SnapshotPublisher(
            context,
            hub,
            self.identity,
            self.trainer.published_models,
            self._service.publish_interval,
            self._service.priority,
            halved=self._service.wire_precision == "bfloat16",
            clock=self.clock,
        )
        self.training = Training(
            self.trainer,
            self.gate,
            self.clock,
            self._publish,
            self._on_metrics,
            self.metrics.put_picture,
            self._service.picture_interval,
            config.tracker.metrics_interval,
            cut=self._take_cut,
        )
        history = max(self.trainer.history, window)
        self.intake = Intake(
            context, hub, self.identity, self.trainer.consume, history, self._ask, self.training.new_data, self.clock
        )
        self.learned = LearnedBefore(self.identity, self.trainer.published_models)
        followed = self.trainer.followed_models
        self.replicas = Replicas(followed, self.clock, patient=window > 0)
        self.trainer.follow(self.replicas)
        self.lockstep: Lockstep | None = None
        if window:
            learned_from = (self.training, self.intake, self.replicas)
            self.lockstep = Lockstep(window, *learned_from, self._offer, self.publisher.settle)
            self.training.pace = self.lockstep
        on_settled = self.lockstep.heard if self.lockstep else None
        self.receiver = ParameterReceiver(context, hub, self.replicas, list(followed), on_settled) if followed else None
        hooks = Hooks(
            self.statistics,
            self._on_message,
            self._on_versions,
            loop_moved_at=lambda: self.training.moved_at if self._living else self.clock.monotonic(),
        )
        self.link = ControlLink(context, hub, self.identity, self.gate, self.metrics, hooks, self.clock)
        self._part = CheckpointPart(self.identity, self.link, self.intake.feeder.wish_cut)
        self._partial = config.checkpoint.allow == "partial"
        self._rate, self._waiting = Rate(), Rate()
        self._living = False
        self.cut_ms = 0.0

    def _offer(self) -> None:
        self.publisher.offer()
        self.trainer.published(self.publisher.versions)

    def _publish(self, now: float) -> bool:
        """Publish if that is due; in lockstep only at the end of a window."""
        if (self.lockstep and self.training.updates) or not self.publisher.offer_if_due(now):
            return False
        self.trainer.published(self.publisher.versions)
        return True

    def live(self) -> None:
        """Join, continue from the versions that the system knows, and train until asked to stop."""
        for thread in filter(None, (self.link, self.publisher, self.receiver)):
            thread.start()
        try:
            if self._begin():
                self.publisher.continue_from(self.link.version_floors)
                priority = set_thread_priority(self._service.priority, also=self._pool)
                log.info("trainer %s joined the system; priority %s", self.identity.name, priority)
                self._living = True
                self.training.run()
            self.link.raise_if_refused()
        finally:
            self.gate.confirm("stopping", self.gate.desired)
            self.intake.close()
            if self.receiver:
                self.receiver.close()
            self.publisher.close()
            self.link.leave()
            self._context.destroy(linger=500)  # lets the last messages reach the hub

    def _begin(self) -> bool:
        """Join, and restore state and parameters; return False if asked to stop meanwhile."""
        began = (
            self.link.wait_joined()
            and self._part.restore(self.gate, self._restore, self._partial)
            and self.learned.take_up(self.link, self.gate)
        )
        self._rate = Rate()
        self.intake.start()
        return began

    def _take_cut(self) -> None:
        """Copy this trainer's whole state if all bodies' streams stand at a cut."""
        cut = self.intake.feeder.cut
        if cut is None:
            return
        begin = time.perf_counter()
        models = {model: read_arrays(module) for model, module in self.trainer.published_models.items()}
        if spoilt := [model for model, arrays in models.items() if not all_finite(arrays)]:
            self.intake.feeder.pass_cut(cut)
            self._part.refuse(cut, f"{', '.join(spoilt)} not finite")
            return
        name, state = self.identity.name, dict(state_of(self.trainer))
        trees: dict[str, Tree] = {f"models/{model}": arrays for model, arrays in models.items()}
        trees[f"data/{name}"] = copied(state.pop("buffer", {}))
        trees[f"trainers/{name}"] = copied(
            {
                "trainer": state,
                "training": self.training.state(),
                "intake": self.intake.state(),
                "random": torch_random_state(),
                "versions": self.publisher.versions,
            }
        )
        self.cut_ms = (time.perf_counter() - begin) * 1e3
        self.intake.feeder.pass_cut(cut)
        self._part.taken(cut, trees)

    def _restore(self, trees: Mapping[str, Tree]) -> None:
        name = self.identity.name
        kept = trees[f"trainers/{name}"]
        self.training.restore(kept["training"])
        self.intake.restore(kept["intake"])
        restore_torch_random_state(kept["random"])
        buffer = trees[f"data/{name}"]
        Restorable(self.trainer).restore({**kept["trainer"], "buffer": buffer} if buffer else kept["trainer"])

    def _ask(self, message: Message) -> None:
        self.link.send(message)

    def _on_message(self, message: Message) -> None:
        if self._part.heard(message) or message.kind != SNAPSHOT or self.learned.came(message):
            return
        if self.receiver:
            self.receiver.take(message)
            self.training.new_data()

    def _on_versions(self, newest: Mapping[str, int]) -> None:
        self.publisher.continue_from(self.link.version_floors)
        self.publisher.repeat_for(newest)
        if self.receiver:
            for question in self.receiver.questions(newest, self.clock.monotonic()):
                self.link.send(self.identity.message("get_parameters", question))

    def _on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.put(step, {**values, "snapshot_copy_ms": self.publisher.copy_ms, "cut_ms": self.cut_ms})

    def _record_lag(self) -> dict[str, dict[str, int]]:
        """Return body → model → how many versions newer this trainer's models are than those of its newest record."""
        newest = self.publisher.versions
        return {
            body: {model: newest[model] - version for model, version in used.items() if model in newest and version}
            for body, used in list(self.intake.newest_versions.items())
        }

    def _rate_hz(self) -> float:
        return self._rate.update(self.clock.monotonic(), self.training.updates)

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of this trainer."""
        return {
            **process_statistics(),
            **gpu_statistics(),
            **self.intake.statistics(),
            **self.trainer.statistics(),
            "rate_hz": self._rate_hz(),
            "models": self.publisher.statistics(),
            "waiting_share": min(1.0, self._waiting.update(self.clock.monotonic(), self.training.waited_s)),
            **self.publisher.counters(),
            "replicas": self.replicas.statistics(),
            **(self.receiver.statistics() if self.receiver else {}),
            "record_lag": self._record_lag(),
            "links": {
                "control": self.link.link.statistics(),
                "experience": self.intake.link.statistics(),
                "parameters": self.publisher.link.statistics(),
                **({"followed": self.receiver.link.statistics()} if self.receiver else {}),
            },
        }


def torch_random_state() -> dict[str, Any]:
    """Return the state of torch's random number generators, of the CPU and of every GPU in use."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if uses_gpu():
        state |= {f"cuda{n}": kept.numpy() for n, kept in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_torch_random_state(state: Mapping[str, Any]) -> None:
    """Restore torch's random number generators, for those devices that exist."""
    for device, kept in state.items():
        tensor = torch.from_numpy(np.array(kept))
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.cuda.is_available() and int(device.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(device.removeprefix("cuda")))


def check_publishes(name: str, declared: Iterable[str] | None, published: Iterable[str]) -> None:
    """Raise ConfigurationError if the hub would allow other models than those that the trainer publishes."""
    if declared is not None and set(declared) != set(published):
        raise ConfigurationError(
            f"trainers.{name}.service.publishes={list(declared)}, but the trainer publishes {', '.join(published)}"
        )


def threads_for(wanted: int | None, trainers: int) -> int:
    """Return the number of torch threads: as configured, else this process's share of all usable cores but one.

    Args:
        wanted: as configured.
        trainers: their number. All may run on this machine, and more threads than cores are many times slower.
    """
    return wanted or max(1, (usable_cores() - 1) // max(trainers, processes_here()))


def build_trainer(config: DictConfig, team: Team | None) -> Trainer:
    """Make the configured trainer, with its number of threads and its seed.

    Raises:
        ConfigurationError: it cannot be made, or cannot be trained by several processes.
    """
    name = config.trainer
    start_torch_threads(threads_for(trainer_service(config, name).threads, len(config.trainers)))
    torch.manual_seed(config.seed)
    algorithm = OmegaConf.to_container(config.trainers[name])
    assert isinstance(algorithm, dict)
    algorithm.pop("service", None)
    with naming(name):
        trainer: Trainer = build(algorithm, f"trainers.{name}")
        if team:
            share_with(team, trainer, f"trainers.{name}")
    return trainer


def serve(overrides: list[str], stop: StopFlag) -> None:
    """Run one trainer until `stop` is set or the system shuts down."""
    keep_freed_memory()
    config = load_config(overrides)
    if config.trainer not in config.trainers:
        raise ConfigurationError(f"experiment {config.name!r} has no trainer {config.trainer!r}")
    name = config.trainer
    with naming(name):
        team = form_team(config.trainers[name].get("device", "cpu"))
    if team and team.rank:
        work(config, team)
        return
    with team or nullcontext(), told_when_full(f"make trainers.{name}.batch_size smaller, or choose smaller models="):
        service = TrainerService(config, team)
        stop.on_set(service.gate.stop)
        stop.on_abandoned(service.link.end_with_controller)
        service.live()


def work(config: DictConfig, team: Team) -> None:
    """Compute a share of each minibatch for the service, which is rank 0, until it ends; only rank 0 heeds signals."""
    before = thread_ids()
    trainer = build_trainer(config, team)
    trainer.follow(Replicas(trainer.followed_models))
    set_thread_priority(trainer_service(config, config.trainer).priority, also=thread_ids() - before)
    team.work()
