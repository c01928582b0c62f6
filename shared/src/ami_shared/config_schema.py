"""The plain values of the configuration: names, types and defaults. configs/config.yaml explains each key.

Components are `_target_`s with their own arguments, and not described here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ObservationSchema:
    """The section `observation`: size of frames, in pixels."""

    height: int = 84
    width: int = 84


@dataclass
class ActionSchema:
    """The section `action`: number of choices of each dimension."""

    choices: list[int] = field(default_factory=lambda: [3, 3, 3, 2, 2])


@dataclass
class InferenceSchema:
    """The section `inference`: a body."""

    name: str = "body"
    interval: float = 0.1
    lateness_tolerance: float = 0.1
    retained_mb: int = 256
    priority: str = "realtime"
    torch_threads: int = 1
    device: str = "cpu"
    agent: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerServiceSchema:
    """The part of a trainer's section that all trainers share: `trainers.<name>.service`."""

    threads: int | None = None
    priority: str = "idle"
    publishes: list[str] | None = None
    publish_interval: float = 1.0
    wire_precision: str = "full"
    picture_interval: float = 120.0


@dataclass
class ControllerSchema:
    """The section `controller`."""

    bind: str = "127.0.0.1"
    key_folder: str | None = None
    insecure: bool = False


@dataclass
class RetentionSchema:
    """The section `checkpoint.keep`: how many checkpoints are kept."""

    newest: int = 3
    hourly: int = 24
    daily: int = 7
    weekly: int = 8


@dataclass
class CheckpointSchema:
    """The section `checkpoint`; times in seconds."""

    restore: str | None = "latest"
    directory: str = MISSING
    interval: float | None = 600.0
    first_after: float = 60.0
    timeout: float = 300.0
    at_shutdown: bool = True
    keep: RetentionSchema = field(default_factory=RetentionSchema)
    allow: str = "all"
    seamless: bool = False


@dataclass
class TrackerSchema:
    """The section `tracker`: the learning record; times in seconds."""

    uri: str | None = None
    experiment: str = MISSING
    write_interval: float = 2.0
    metrics_interval: float = 10.0


@dataclass
class ExperimentSchema:
    """The whole system. configs/config.yaml explains each key."""

    name: str = MISSING
    hub: str = MISSING
    join: str | None = None
    take_over: bool = False
    run_dir: str = MISSING
    seed: int = 0
    policy_input: str = "image"
    pace: str = "realtime"
    lockstep_window: int = 128
    observation: ObservationSchema = field(default_factory=ObservationSchema)
    action: ActionSchema = field(default_factory=ActionSchema)
    models: dict[str, Any] = field(default_factory=dict)
    inference: InferenceSchema = field(default_factory=InferenceSchema)
    trainer: str = MISSING
    trainers: dict[str, Any] = field(default_factory=dict)
    controller: ControllerSchema = field(default_factory=ControllerSchema)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    tracker: TrackerSchema = field(default_factory=TrackerSchema)
    world: dict[str, Any] | None = None
