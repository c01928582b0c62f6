"""The command `ami-inference`."""

from __future__ import annotations

from ami_shared.command import StopFlag, run_command
from ami_shared.service_command import service_main

USAGE = """\
ami-inference [key=value …]   run one body: sensors, agent, actuators

  experiment=NAME        simulated (default), vrchat, video, noise, reference, doom, cartpole
  hub=HOST:PORT          where the controller's hub is (default 127.0.0.1:5550, or AMI_HUB)
  --join FILE            key file from `ami keys add`: this body's name, the hub's address and key
  --take-over            end a running process that has this body's name
  inference.name=NAME    name of this body; each body needs its own
  inference.interval=S   seconds between steps; 0 = as fast as it goes
  --cfg                  print the composed configuration and exit
  --health               print the health of the body running on this machine; exit code 0 or 1
"""


def main() -> None:
    """Entry point."""
    run_command("inference", _main)


def _main(arguments: list[str], stop: StopFlag) -> None:
    def serve(overrides: list[str], stop: StopFlag) -> None:
        from ami_inference.service import serve

        serve(overrides, stop)

    service_main("body", arguments, stop, USAGE, serve)


if __name__ == "__main__":
    main()
