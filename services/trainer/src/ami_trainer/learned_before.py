"""The parameters learned before this process: the newest snapshots that the controller keeps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ami_shared.errors import ConfigurationError
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)

ASK_AGAIN_S = 10.0


class Link(Protocol):
    """What is needed here of the link to the controller."""

    @property
    def versions(self) -> Mapping[str, int]: ...

    def send(self, message: Message) -> None: ...


class LearnedBefore:
    """Fills a trainer's models before it begins, so that a crash costs no more than the last moments."""

    def __init__(self, identity: Identity, models: Mapping[str, nn.Module]) -> None:
        self._identity, self._models = identity, models
        self._came: dict[str, Snapshot] = {}
        self._done = False

    def came(self, message: Message) -> bool:
        """Take a snapshot from the controller; return whether it was of one of this trainer's own models.

        Raises:
            WireError: the snapshot is malformed.
        """
        if message.get("model", str) not in self._models:
            return False
        if not self._done:
            snapshot = Snapshot.from_message(message)
            self._came[snapshot.model] = snapshot
        return True

    def take_up(self, link: Link, gate: Gate) -> bool:
        """Wait for the snapshots of all own models that the controller keeps, and fill the models with them.

        Returns:
            Whether to continue: False if asked to stop meanwhile. Without any snapshot the models are unchanged.

        Raises:
            ConfigurationError: a snapshot does not fit its model.
        """
        asked_at = float("-inf")
        while missing := {model for model in self._models if model in link.versions} - self._came.keys():
            if not gate.may_wait():
                return False
            now = time.monotonic()
            if now - asked_at > ASK_AGAIN_S:
                if asked_at > 0:
                    log.warning("still waiting for the controller's %s", ", ".join(sorted(missing)))
                asked_at = now
                for model in missing:
                    link.send(self._identity.message("get_parameters", {"model": model, "newer_than": 0}))
            time.sleep(0.02)
        self._done = True
        for model, snapshot in self._came.items():
            state = {name: torch.from_numpy(np.array(array)) for name, array in snapshot.arrays.items()}
            try:
                self._models[model].load_state_dict(state)
            except RuntimeError as error:
                why = " ".join(str(error).split())
                raise ConfigurationError(f"version {snapshot.version} of {model} does not fit: {why:.200}") from None
            log.info("%s continues from version %d", model, snapshot.version)
        self._came.clear()
        return True
