"""The command `ami-controller`."""

from __future__ import annotations

from ami_shared.command import StopFlag, run_command
from ami_shared.service_command import service_main

USAGE = """\
ami-controller [key=value …]   run the hub, registry, lifecycle, parameter store and learning record

  experiment=NAME          simulated (default), vrchat, video, noise, reference, doom, cartpole
  hub=HOST:PORT            base of the hub's five ports (default 127.0.0.1:5550, or AMI_HUB)
  controller.bind=ADDRESS  address to listen on (default 127.0.0.1)
  controller.key_folder=D  keys of the hub, from `ami keys init`: needed for any address but a loopback one
  --insecure               listen without keys, on a network without strangers
  run_dir=PATH             where everything is written
  tracker.uri=URI          MLflow server; default: a sqlite file in run_dir
  --cfg                    print the composed configuration and exit
  --health                 print the health of the controller running on this machine; exit code 0 or 1
"""


def main() -> None:
    """Entry point."""
    run_command("controller", _main)


def _main(arguments: list[str], stop: StopFlag) -> None:
    def serve(overrides: list[str], stop: StopFlag) -> None:
        from ami_controller.service import serve

        serve(overrides, stop)

    service_main("controller", arguments, stop, USAGE, serve)


if __name__ == "__main__":
    main()
