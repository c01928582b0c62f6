"""`ami keys`: makes, lists and revokes the keys for the hub; on the controller's machine."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ami_controller.key_folder import KeyFolder
from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError
from ami_shared.keys import ROLES

DEFAULT_FOLDER = "keys"
DEFAULT_HUB = "127.0.0.1:5550"


def add_words(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `ami keys` to its parser."""
    folder = argparse.ArgumentParser(add_help=False)
    default = os.environ.get("AMI_KEYS", DEFAULT_FOLDER)
    folder.add_argument("--dir", default=default, help="controller.key_folder (default: AMI_KEYS, else keys)")
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    init = words.add_parser("init", parents=[folder], help="make the hub's own key pair; once")
    init.add_argument("--hub", metavar="HOST:PORT", help=f"the address services connect to (default {DEFAULT_HUB})")
    add = words.add_parser("add", parents=[folder], help="admit a service, and make the key file for its machine")
    add.add_argument("name", help="name of the service: body, ppo, …; for people, any name")
    add.add_argument("--role", required=True, choices=ROLES)
    add.add_argument("--to", type=Path, metavar="FILE", help="where to write the key file (default: ./NAME.key.json)")
    add.add_argument(
        "--hub", metavar="HOST:PORT", help="the address this service connects to (default: that of `ami keys init`)"
    )
    add.add_argument("--if-absent", action="store_true", help="do nothing if the service has or had a key")
    words.add_parser("list", parents=[folder], help="list who may connect, and whose key was revoked")
    revoke = words.add_parser("revoke", parents=[folder], help="stop admitting a service; takes two seconds")
    revoke.add_argument("name")


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; raise ConfigurationError if it cannot be carried out."""
    folder = KeyFolder(Path(arguments.dir))
    {"init": init, "add": add, "list": show_list, "revoke": revoke}[arguments.word](folder, arguments)
    return 0


def init(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Make the hub's key pair; raise ConfigurationError if there is one for another address."""
    address = HubAddress.parse(arguments.hub or DEFAULT_HUB)
    if folder.init(address):
        print(f"made {folder.folder}: start the controller with controller.key_folder={folder.folder}")
    elif arguments.hub and HubAddress.parse(folder.hub()) != address:
        raise ConfigurationError(
            f"{folder.folder} has keys already, for services that connect to {folder.hub()}: they stay; name another "
            f"address for a service by `ami keys add NAME --role ROLE --hub {address}`"
        )
    else:
        print(f"{folder.folder} has keys already: left as they are")


def add(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Admit a service, and write its key file."""
    if arguments.if_absent and folder.has_or_had(arguments.name):
        print(f"{arguments.name} has or had a key: left as it is")
        return
    to = arguments.to or Path(f"{arguments.name}.key.json")
    folder.add(arguments.name, arguments.role, to, arguments.hub)
    service = {"body": "ami-inference", "trainer": "ami-trainer"}.get(arguments.role)
    print(f"{to}: copy it to the machine of {arguments.role} {arguments.name}, and keep it secret")
    experiment = " experiment=… (as the controller)" if service else ""
    print(f"there: {service or 'ami status'} --join {to.name}{experiment}")


def show_list(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Print a table; raise ConfigurationError if there is no folder of keys, or a file that is no entry."""
    folder.hub()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "role", "public key", "since", ""):
        table.add_column(column)
    allowed, revoked = folder.allowed(), folder.revoked()
    for listing, note in ((allowed, ""), (revoked, "revoked")):
        for peer in listing.peers:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(peer.added))
            table.add_row(peer.name, peer.role, peer.public.decode(), since, note)
    Console(width=None if os.isatty(1) else 160, highlight=False, markup=False).print(table)
    if odd := [*allowed.odd.values(), *revoked.odd.values()]:
        raise ConfigurationError("; ".join(odd))


def revoke(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Revoke a service's key."""
    folder.revoke(arguments.name)
    print(f"{arguments.name} is revoked: a running controller disconnects it within two seconds")
