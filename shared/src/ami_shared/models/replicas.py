"""Replicas: a service's copies of trainers' models. Spare copies are filled, and swapped in whole between steps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ami_shared.clock import Clock, SystemClock
from ami_shared.errors import WireError
from ami_shared.models.device import CPU, Aside, device_of
from ami_shared.models.parameters import write_arrays
from ami_shared.snapshots import Snapshot


@dataclass
class Held:
    """One generation of one model: the module, the origin of its parameters, and whether it has been filled."""

    module: nn.Module
    version: int = 0
    created: float = 0.0
    in_place: bool = False


class Replicas:
    """All models of others that one agent or trainer uses.

    `offer()` is called by receiving threads and works on the spare copies; `swap()` is called by the loop between
    two steps and exchanges references only, so that no step waits for a copy and none sees two generations.

    Attributes:
        device: of all modules.
        refused: number of snapshots that did not fit their model.
        outdated: number of snapshots that were older than what there was.
    """

    def __init__(self, modules: Mapping[str, nn.Module], clock: Clock | None = None, patient: bool = False) -> None:
        """Copy each module, so that one copy can be filled while the other is in use.

        Args:
            modules: name → module.
            clock: dates the snapshots in use.
            patient: whether swap() waits for a receiving thread that is filling a copy, instead of skipping this step.
        """
        self._clock, self._patient = clock or SystemClock(), patient
        self._lock = threading.Lock()
        self._offering = threading.Lock()
        self._used = {name: Held(_for_inference(module)) for name, module in modules.items()}
        self._spare = {name: Held(copy.deepcopy(held.module)) for name, held in self._used.items()}
        self._ready: set[str] = set()
        self._versions = dict.fromkeys(self._used, 0)
        self.device = device_of(*modules.values())
        self._aside = Aside(self.device)
        self.refused = self.outdated = 0

    def __getitem__(self, model: str) -> nn.Module:
        """The module that the present step uses, in evaluation mode."""
        return self._used[model].module

    def __contains__(self, model: str) -> bool:
        return model in self._used

    @property
    def versions(self) -> Mapping[str, int]:
        """Version of each model that the present step uses; 0 before the first snapshot."""
        return self._versions

    def newest_versions(self) -> Mapping[str, int]:
        """Version of each model that the next step will use."""
        with self._lock:
            return {name: (self._spare if name in self._ready else self._used)[name].version for name in self._used}

    def offer(self, snapshot: Snapshot) -> bool:
        """Take a snapshot if it is newer; return whether it was.

        Raises:
            WireError: it does not fit the model; that is counted, and nothing is changed.
        """
        if snapshot.model not in self._used:
            return False
        with self._offering:
            if snapshot.version <= (newest := self.newest_versions()[snapshot.model]):
                self.outdated += snapshot.version < newest
                return False
            with self._lock:
                was_ready = snapshot.model in self._ready
                self._ready.discard(snapshot.model)
                spare = self._spare[snapshot.model]
            try:
                with self._aside.copies():
                    self._fill(spare, snapshot)
            except WireError:
                self.refused += 1
                with self._lock:
                    self._ready |= {snapshot.model} if was_ready else set()
                raise
            with self._lock:
                spare.version, spare.created = snapshot.version, snapshot.created
                self._ready.add(snapshot.model)
            return True

    def _fill(self, spare: Held, snapshot: Snapshot) -> None:
        arrays, lasting = snapshot.arrays, snapshot.lasting and self.device == CPU
        if spare.in_place and not lasting:  # its memory belongs to a snapshot, and must not be written to
            arrays = {name: np.array(array) for name, array in arrays.items()}
        write_arrays(spare.module, arrays, spare.in_place or lasting, self._aside.write)
        spare.in_place = lasting

    def swap(self) -> bool:
        """Put every model into use that is ready; return whether anything changed."""
        if not self._ready or not self._lock.acquire(blocking=self._patient):
            return False
        try:
            for model in self._ready:
                self._used[model], self._spare[model] = self._spare[model], self._used[model]
            self._ready.clear()
            self._versions = {name: held.version for name, held in self._used.items()}
        finally:
            self._lock.release()
        return True

    def statistics(self) -> dict[str, Any]:
        """Return version and age of each model in use."""
        now = self._clock.time()
        return {
            name: {"version": held.version, "age_s": now - held.created if held.version else None}
            for name, held in self._used.items()
        }


def _for_inference(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
