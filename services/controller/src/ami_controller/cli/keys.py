"""`ami keys`: makes, lists and revokes the keys that open the hub's doors; on the controller's machine."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ami_controller.key_folder import KeyFolder
from ami_shared.bus import HubAddress
from ami_shared.keys import ROLES

DEFAULT_FOLDER = "keys"


def add_words(parser: argparse.ArgumentParser) -> None:
    """Add the words of `ami keys` to its parser."""
    folder = argparse.ArgumentParser(add_help=False)
    default = os.environ.get("AMI_KEYS", DEFAULT_FOLDER)
    folder.add_argument("--dir", default=default, help="controller.key_folder (default: AMI_KEYS, else keys)")
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    init = words.add_parser("init", parents=[folder], help="make the hub's own pair; once")
    init.add_argument(
        "--hub", default="127.0.0.1:5550", metavar="HOST:PORT", help="as services dial it (default %(default)s)"
    )
    add = words.add_parser("add", parents=[folder], help="let a service in, and make the key file for its machine")
    add.add_argument("name", help="of the service: body, ppo, …; for people, any name")
    add.add_argument("--role", required=True, choices=ROLES)
    add.add_argument("--to", type=Path, metavar="FILE", help="where to write the key file (default: ./NAME.key.json)")
    add.add_argument("--hub", metavar="HOST:PORT", help="as this service dials it (default: that of `ami keys init`)")
    add.add_argument("--if-absent", action="store_true", help="do nothing where the service has a key, or had one")
    words.add_parser("list", parents=[folder], help="who may come in, and who may not any more")
    revoke = words.add_parser("revoke", parents=[folder], help="let a service in no more; takes two seconds")
    revoke.add_argument("name")


def run(arguments: argparse.Namespace) -> int:
    """Do what the words say; raise ConfigurationError where that cannot be done."""
    folder = KeyFolder(Path(arguments.dir))
    {"init": init, "add": add, "list": show_list, "revoke": revoke}[arguments.word](folder, arguments)
    return 0


def init(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Make the hub's pair."""
    if folder.init(HubAddress.parse(arguments.hub)):
        print(f"made {folder.folder}: start the controller with controller.key_folder={folder.folder}")
    else:
        print(f"{folder.folder} has keys already: left as they are")


def add(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Let a service in."""
    if arguments.if_absent and any(peer.name == arguments.name for peer in [*folder.allowed(), *folder.revoked()]):
        print(f"{arguments.name} has or had a key: left as it is")
        return
    to = arguments.to or Path(f"{arguments.name}.key.json")
    folder.add(arguments.name, arguments.role, to, arguments.hub)
    command = {"body": "ami-inference", "trainer": "ami-trainer"}.get(arguments.role, "ami status")
    print(f"{to}: carry it to the machine of {arguments.role} {arguments.name}, and show it to nobody")
    print(f"there: {command} --join {to.name}")


def show_list(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Print a table; raise ConfigurationError where there is no folder of keys."""
    folder.hub()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "role", "public key", "since", ""):
        table.add_column(column)
    for peers, note in ((folder.allowed(), ""), (folder.revoked(), "revoked")):
        for peer in peers:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(peer.added))
            table.add_row(peer.name, peer.role, peer.public.decode(), since, note)
    Console(width=None if os.isatty(1) else 160, highlight=False, markup=False).print(table)


def revoke(folder: KeyFolder, arguments: argparse.Namespace) -> None:
    """Let a service in no more."""
    folder.revoke(arguments.name)
    print(f"{arguments.name} is revoked: a running controller throws it out within two seconds")
