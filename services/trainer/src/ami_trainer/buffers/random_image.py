"""Random image buffer: a uniform sample (reservoir sampling, Vitter 1985), after a long time a geometric memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.wire import Array


class RandomImageBuffer:
    """Keeps `capacity` frames (3, H, W) uint8.

    Of the first `memory` frames all have the same probability of being among them. From then on each new frame
    displaces a kept one with the probability capacity / memory, so that a kept one survives `memory` new ones on
    average: a life of months goes on learning from what is new.

    New frames are fresh: none is drawn before `take_fresh()` has returned it, to measure generalisation, unless more
    arrive than can wait for that. Safe between the feeder and the training thread.
    """

    def __init__(
        self,
        capacity: int,
        height: int,
        width: int,
        seed: int = 0,
        fresh_capacity: int = 64,
        memory: int | None = None,
    ) -> None:
        """Allocate the memory of all frames.

        Args:
            capacity: number of frames kept.
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            seed: of the random choices.
            fresh_capacity: number of fresh frames that can wait for take_fresh().
            memory: number of frames that a kept one survives on average; None = it is a uniform sample for ever.

        Raises:
            ConfigurationError: the memory is smaller than the buffer.
        """
        if memory is not None and memory < capacity:
            raise ConfigurationError(f"a buffer of {capacity} frames cannot have a memory of {memory}")
        self._memory = memory
        self.frame_shape = (3, height, width)
        self._frames = np.empty((capacity, *self.frame_shape), np.uint8)
        self._fresh = np.empty((fresh_capacity, *self.frame_shape), np.uint8)
        self._filled = self._fresh_count = 0
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.seen = 0

    def __len__(self) -> int:
        return self._filled + self._fresh_count

    @property
    def capacity(self) -> int:
        """Number of frames that the buffer can hold."""
        return len(self._frames)

    def add(self, frames: Array) -> None:
        """Add frames (N, 3, H, W) uint8; raise WireError if they are something else."""
        if frames.dtype != np.uint8 or frames.shape[1:] != self._frames.shape[1:]:
            expected = "×".join(map(str, self._frames.shape[1:]))
            raise WireError(f"observation {frames.dtype}{list(frames.shape[1:])} is not uint8 {expected}")
        with self._lock:
            for frame in frames:
                self._add_one(frame)

    def _add_one(self, frame: Array) -> None:
        if self._fresh_count == len(self._fresh):
            self._mix_in_oldest()
        self._fresh[self.seen % len(self._fresh)] = frame
        self._fresh_count += 1
        self.seen += 1

    def _mix_in_oldest(self) -> None:
        """Let the oldest fresh frame be drawn from now on, if the reservoir keeps it."""
        number = self.seen - self._fresh_count
        frame = self._fresh[number % len(self._fresh)]
        self._fresh_count -= 1
        if self._filled < len(self._frames):
            if self._filled >= number or self._random.random() < self._filled / self._remembered(number):  # enlarged
                self._frames[self._filled] = frame
                self._filled += 1
        elif (slot := int(self._random.integers(self._remembered(number + 1)))) < len(self._frames):
            self._frames[slot] = frame

    def _remembered(self, frames: int) -> int:
        return frames if self._memory is None else min(frames, self._memory)

    def sample(self, count: int) -> Array:
        """Return `count` random frames, drawn with replacement, none of them fresh: (count, 3, H, W) uint8.

        If there are only fresh frames, all may be drawn from now on.
        """
        with self._lock:
            for _ in range(0 if self._filled else self._fresh_count):
                self._mix_in_oldest()
            return self._frames[self._random.integers(self._filled, size=count)]

    def spread(self, count: int) -> Array:
        """Return `count` evenly spaced frames of the buffer: (count, 3, H, W) uint8; no random number is drawn."""
        with self._lock:
            return self._frames[np.linspace(0, self._filled - 1, count).astype(np.int64)]

    def take_fresh(self) -> Array:
        """Return copies of the fresh frames, oldest first: (n, 3, H, W) uint8; they may be drawn from now on."""
        with self._lock:
            fresh = self._fresh[np.arange(self.seen - self._fresh_count, self.seen) % len(self._fresh)]
            while self._fresh_count:
                self._mix_in_oldest()
            return fresh

    def state(self) -> dict[str, Any]:
        """Return what restore() needs; arrays are views, which must be copied before anything is added."""
        return {
            "frames": self._frames[: self._filled],
            "fresh": self._fresh,
            "fresh_count": self._fresh_count,
            "seen": self.seen,
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the frames of an earlier buffer; if not all fit, a random choice of them.

        Raises:
            WireError: the frames have another size.
        """
        frames, fresh = state["frames"], state["fresh"]
        if not frames.shape[1:] == fresh.shape[1:] == self._frames.shape[1:]:
            raise WireError(f"frames {list(frames.shape[1:])} do not fit a buffer of {list(self._frames.shape[1:])}")
        self._random.bit_generator.state = state["random"]
        if len(frames) > self.capacity:
            frames = frames[self._random.permutation(len(frames))[: self.capacity]]
        self._filled = len(frames)
        self._frames[: self._filled] = frames
        self.seen, self._fresh_count = int(state["seen"]), min(int(state["fresh_count"]), len(self._fresh))
        waiting = np.arange(self.seen - self._fresh_count, self.seen)
        self._fresh[waiting % len(self._fresh)] = fresh[waiting % len(fresh)]
        if self._filled + self._fresh_count > self.seen:  # an older state, whose fresh frames could be drawn at once
            self._fresh_count = 0

    def statistics(self) -> Mapping[str, Any]:
        """Return the kind of memory, fill, capacity and the number of frames seen."""
        forgets = self._memory is not None and self.seen > self._memory
        return {
            "kind": f"a memory of {self._memory} frames" if forgets else "uniform over everything seen",
            "fill": min(len(self), self.capacity),
            "capacity": self.capacity,
            "seen": self.seen,
        }
