"""The command `ami`. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no controller, 4 timed out, 130 by Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ami_controller.cli import keys
from ami_controller.cli.keys import DEFAULT_HUB
from ami_controller.coordinator import LONGEST_COMMAND_S, SHUTDOWN_S
from ami_shared.bus import HubAddress
from ami_shared.command import exit_code, leave, tolerate_any_text
from ami_shared.errors import ConfigurationError
from ami_shared.keys import KeyFile
from ami_shared.logs import configure_logging

COMMAND_TIMEOUT_S = 30.0
SAVE_TIMEOUT_S = 300.0


def main() -> None:
    """Run the command line and exit."""
    tolerate_any_text()
    configure_logging(stamped=True, stream=sys.stderr)
    parser = build_parser()
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command not in ("up", "doctor"):
        meant = next((f" (for {word} say --hub {word[4:]})" for word in rest if word.startswith("hub=")), "")
        parser.error(f"unrecognised: {' '.join(rest)}{meant}")
    options = [word for word in rest if word.startswith("-")]
    if options:
        parser.error(f"unrecognised: {' '.join(options)}")
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    leave(exit_code("ami", lambda: COMMANDS[arguments.command](arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="ami",
        description="Run an AMI system on this machine, or talk to the controller of one anywhere.",
        epilog="exit codes: 0 done, 1 failed, 2 usage or configuration, 3 no controller, 4 timed out, 130 by Ctrl-C",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    looking = _hub_options("an operator or observer")
    commanding = _hub_options("an operator (observers may not give this command)")
    overridable = argparse.ArgumentParser(add_help=False)
    overridable.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. experiment=noise models=reference")
    waiting = argparse.ArgumentParser(add_help=False)
    waiting.add_argument(
        "--timeout",
        type=seconds,
        default=COMMAND_TIMEOUT_S,
        metavar="S",
        help="seconds to wait for confirmations (default %(default)g)",
    )

    commands.add_parser("up", parents=[overridable], help="run a whole experiment on this machine")
    status = commands.add_parser("status", parents=[looking], help="show the state of the system")
    status.add_argument("--json", action="store_true", help="as JSON; docs/status.md documents the keys")
    commands.add_parser("watch", parents=[looking], help="show the state live, with sparklines")
    commands.add_parser("pause", parents=[commanding, waiting], help="pause every service; bodies stand still")
    commands.add_parser("resume", parents=[commanding, waiting], help="resume after a pause")
    save = commands.add_parser("save", parents=[commanding], help="write a checkpoint of the whole running system")
    save.add_argument("--name", help="name of the checkpoint (default: the time)")
    save.add_argument("--wait", action="store_true", help="return when it is written instead of when it has begun")
    save.add_argument(
        "--timeout",
        type=seconds,
        default=SAVE_TIMEOUT_S,
        metavar="S",
        help="seconds that --wait waits at most (default %(default)g)",
    )
    stored = commands.add_parser("checkpoints", help="list, verify, show or remove the checkpoints on this machine")
    words = "list, verify [NAME …], show NAME or remove NAME; key=value names the run"
    stored.add_argument("words", nargs="*", metavar="WORD", help=words)
    stored.add_argument("--dir", help="folder of checkpoints (default: that of the experiment's run_dir)")
    shutdown = commands.add_parser(
        "shutdown", parents=[commanding], help="save, then end every service in an orderly way"
    )
    shutdown.add_argument(
        "--timeout",
        type=seconds,
        default=SHUTDOWN_S,
        metavar="S",
        help="seconds to wait, four fifths of them for the save (default %(default)g)",
    )
    keys.add_words(commands.add_parser("keys", help="make, list and revoke the keys for the hub"))
    doctor = commands.add_parser("doctor", parents=[overridable], help="check this machine and say what to fix")
    doctor.add_argument(
        "--join",
        metavar="FILE",
        help="key file of a service that will run here, or of an operator (default: AMI_JOIN)",
    )
    return parser


def _hub_options(role: str) -> argparse.ArgumentParser:
    """Return the options that name the hub and the key file, which must be of this role."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--hub",
        default=os.environ.get("AMI_HUB"),
        metavar="HOST:PORT",
        help=f"the controller's hub (default: AMI_HUB, else that of the key file, else {DEFAULT_HUB})",
    )
    options.add_argument(
        "--join",
        default=os.environ.get("AMI_JOIN"),
        metavar="FILE",
        help=f"key file of {role}, from `ami keys add` (default: AMI_JOIN)",
    )
    return options


def hub_to_dial(arguments: argparse.Namespace) -> HubAddress:
    """Return the hub named by arguments and environment, with the credentials of the key file if one is given."""
    if not arguments.join:
        return HubAddress.parse(arguments.hub or DEFAULT_HUB)
    key = KeyFile.load(Path(arguments.join))
    if key.role not in ("operator", "observer"):
        raise ConfigurationError(
            f"key file {arguments.join} is for the role {key.role}: use one of an operator or observer"
        )
    return HubAddress.parse(arguments.hub or key.hub).with_credentials(key.credentials)


def seconds(text: str) -> float:
    """Parse a timeout in seconds that the controller accepts."""
    value = float(text)
    if not 0 < value <= LONGEST_COMMAND_S:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most {LONGEST_COMMAND_S:g} seconds")
    return value


def run_up(arguments: argparse.Namespace) -> int:
    from ami_controller.cli.up import up

    return up(arguments.overrides)


def run_doctor(arguments: argparse.Namespace) -> int:
    from ami_controller.cli.doctor import doctor

    path = arguments.join or os.environ.get("AMI_JOIN")
    return doctor(arguments.overrides, Path(path) if path else None, named_by_word=arguments.join is not None)


def run_status(arguments: argparse.Namespace) -> None:
    from ami_controller.cli.client import Client
    from ami_controller.cli.render import render_status

    with Client(hub_to_dial(arguments)) as client:
        status = client.status()
    if arguments.json:
        print(json.dumps(finite(status), indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(render_status(status))


def finite(value: Any) -> Any:
    """Return a JSON value with null for the numbers that JSON cannot write (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_watch(arguments: argparse.Namespace) -> int:
    from ami_controller.cli.watch import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(hub_to_dial(arguments))
    return 0


def run_command(arguments: argparse.Namespace) -> None:
    from ami_controller.cli.client import Client

    with Client(hub_to_dial(arguments)) as client:
        print(describe_outcome(arguments.command, client.command(arguments.command, arguments.timeout)))


def describe_outcome(command: str, outcome: Mapping[str, Any]) -> str:
    """Return the lines that say who confirmed after how long, and what was saved."""
    done = {"pause": "paused", "resume": "running again", "shutdown": "shut down"}[command]
    lines = [f"{name}  {took_s * 1000:.0f} ms" for name, took_s in outcome["took_s"].items()]
    lines += [f"saved as checkpoint {outcome['checkpoint']}"] if "checkpoint" in outcome else []
    lines += [f"NOT saved: {outcome['unsaved']}"] if "unsaved" in outcome else []
    return "\n  ".join([f"{done}; confirmed by {len(outcome['took_s'])}:", *lines])


def run_save(arguments: argparse.Namespace) -> None:
    from ami_controller.cli.client import Client

    with Client(hub_to_dial(arguments)) as client:
        saved = client.save(arguments.name, arguments.timeout if arguments.wait else None)
    if "path" in saved:
        print(f"saved {saved['path']}: {saved['bytes'] / 1e6:,.1f} MB in {saved['took_s']:.1f} s")
    else:
        print(f"saving checkpoint {saved['checkpoint']}; `ami status` shows how far it is")


def run_checkpoints(arguments: argparse.Namespace) -> int:
    from ami_controller.cli import checkpoints

    overrides = [word for word in arguments.words if "=" in word]
    what, *names = [word for word in arguments.words if "=" not in word] or ["list"]
    if what not in ("list", "verify", "show", "remove"):
        raise ConfigurationError(f"ami checkpoints {what}: the choices are list, verify, show and remove")
    if what == "list" and names:
        raise ConfigurationError(f"ami checkpoints list {' '.join(names)}: list takes no names; use show NAME for one")
    folder = checkpoints.folder_of(arguments.dir, overrides)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    if what in ("show", "remove") and len(names) != 1:
        raise ConfigurationError(f"ami checkpoints {what}: name one checkpoint")
    if what == "list":
        return checkpoints.show_list(folder, console)
    if what == "verify":
        return checkpoints.verify(folder, names, console)
    {"show": checkpoints.show, "remove": checkpoints.remove}[what](folder, names[0])
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "up": run_up,
    "doctor": run_doctor,
    "status": run_status,
    "watch": run_watch,
    "pause": run_command,
    "resume": run_command,
    "shutdown": run_command,
    "save": run_save,
    "checkpoints": run_checkpoints,
    "keys": keys.run,
}

if __name__ == "__main__":
    main()
