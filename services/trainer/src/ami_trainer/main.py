"""The command `ami-trainer`."""

from __future__ import annotations

from ami_shared.command import StopFlag, run_command
from ami_shared.service_command import service_main, spelt_out

USAGE = """\
ami-trainer [NAME] [key=value …]   run one trainer of the experiment

  trainer=NAME           which one: image_vae (default), random_features, inverse_dynamics, forward_dynamics, ppo
  experiment=NAME        simulated (default), vrchat, video, noise, reference, doom, cartpole
  hub=HOST:PORT          where the controller's hub is (default 127.0.0.1:5550, or AMI_HUB)
  --join FILE            key file from `ami keys add`: this trainer's name, the hub's address and key
  --take-over            end a running process that has this trainer's name
  models=SIZE            tiny, small (default), reference, large, huge
  --describe             print layers, parameter counts, memory and snapshot bytes of the models, and exit
  --cfg                  print the composed configuration and exit
  --health               print the health of this trainer, running on this machine; exit code 0 or 1
"""


def main() -> None:
    """Entry point."""
    run_command("trainer", _main)


def _main(arguments: list[str], stop: StopFlag) -> None:
    def serve(overrides: list[str], stop: StopFlag) -> None:
        from ami_trainer.service import serve

        serve(overrides, stop)

    if "--describe" in arguments:
        from ami_shared.config import load_config
        from ami_trainer.describe import describe, names_in_use

        words = spelt_out("trainer", [word for word in arguments if word != "--describe"])
        config = load_config(words)
        used = names_in_use(config)
        print(describe({name: section for name, section in config.models.items() if name in used}))
    else:
        service_main("trainer", arguments, stop, USAGE, serve)


if __name__ == "__main__":
    main()
