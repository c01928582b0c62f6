"""A whole hub in one process, with keys or without: router, forwarders, parameter store, doorkeeper."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import zmq
from checkpointing import checkpointing

from ami_controller.authority import Authority
from ami_controller.coordinator import Coordinator
from ami_controller.doorkeeper import Doorkeeper, Security
from ami_controller.forwarders import make_forwarders, make_guarded_forwarders
from ami_controller.guarded_forwarder import GuardedForwarder
from ami_controller.hub import Router
from ami_controller.key_folder import KeyFolder, Peer
from ami_controller.lifecycle import Lifecycle
from ami_controller.parameter_store import ParameterStore
from ami_controller.registry import Registry
from ami_controller.tracker import Tracker
from ami_shared.bus import HubAddress
from ami_shared.keys import Credentials, KeyFile, Pair

ROLES = {"body": "body", "twin": "body", "image_vae": "trainer", "ppo": "trainer", "me": "operator", "eye": "observer"}
MODELS_OF = {"image_vae": ["image_encoder"], "ppo": ["policy_value"]}


class WholeHub:
    """Serves until it is closed."""

    def __init__(self, hub: HubAddress, folder: Path, keys: bool) -> None:
        self.hub, self._files = hub, folder
        self.keys = KeyFolder(folder / "keys")
        self.security: Security | None = None
        self.doorkeeper: Doorkeeper | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        if keys:
            self.keys.init(hub)
            for name, role in ROLES.items():
                self.keys.add(name, role, folder / f"{name}.json")
            self.security = Security(self.keys, Authority([], MODELS_OF), Pair.new())
            self.security.look_again()
            self.doorkeeper = Doorkeeper(self._context, self.security, self._cut_off)
            self.doorkeeper.start()
        self.router = Router(self._context, hub, self.security)
        forwarders = make_guarded_forwarders(self._context, hub, self.security) if self.security else None
        self.forwarders = forwarders or make_forwarders(hub)
        for forwarder in self.forwarders:
            forwarder.start()
        own = self.security.credentials if self.security else None
        self.store = ParameterStore(self._context, hub.with_credentials(own))
        self.store.start()
        self.registry, self.lifecycle = Registry({}), Lifecycle()
        self._coordinator = Coordinator(
            self.registry,
            self.lifecycle,
            self.store,
            Tracker(folder, None, 1.0),
            checkpointing(folder, self.registry),
            {},
            lambda now: {"system": "running"},
            lambda: None,
        )
        self._ending = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def of(self, name: str) -> HubAddress:
        """Return the hub as a service dials it: with the credentials of its key file where there are keys."""
        return self.hub.with_credentials(self.credentials(name)) if self.security else self.hub

    def credentials(self, name: str) -> Credentials:
        return KeyFile.load(self._files / f"{name}.json").credentials

    def refused(self, what: str) -> int:
        assert self.security is not None
        return self.security.refusals.count[what]

    def _cut_off(self, revoked: list[Peer]) -> None:
        self.router.cut_off(revoked)
        for forwarder in self.forwarders:
            assert isinstance(forwarder, GuardedForwarder)
            forwarder.reopen()

    def _serve(self) -> None:
        while not self._ending:
            self.router.serve_once(self._coordinator)

    def close(self) -> None:
        self._ending = True
        self.router.wake()
        self._thread.join()
        self.store.close()
        self.router.close()
        parts: list[Any] = [*self.forwarders, *filter(None, [self.doorkeeper])]
        for part in parts:
            part.close()
            part.join(30.0)
        self._context.destroy(linger=0)
        assert not any(part.is_alive() for part in parts)
