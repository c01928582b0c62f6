"""The command `ami-world`: connects game, OSC socket and camera, and runs the tics in real time."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, closing
from typing import Any

from ami_shared.command import StopFlag, leave, run_command
from ami_shared.config import load_config
from ami_shared.errors import AmiError
from ami_world.doom import DoomWorld, Moment
from ami_world.exploration import Exploration, reachable_cells
from ami_world.frames import Frames
from ami_world.inputs import HeldInputs, movement
from ami_world.osc import OscReceiver
from ami_world.pacing import FrameGrid, HangWatch, RateMeter, TicGrid
from ami_world.settings import TIC_RATE, WorldSettings, settings_from
from ami_world.status import GameStatus, Position, report
from ami_world.web import Camera

log = logging.getLogger("ami_world")

RATE_WINDOW_TICS = 5 * TIC_RATE
HANG_S = 60.0  # without a tic
LOOK_S = 1.0
USAGE = """\
ami-world [key=value …]   run the simulated world, in which the body of experiment=simulated sees and moves

  world.http_port=PORT    of the camera and the page (default 8080)
  world.osc_port=PORT     where the body's moves arrive (default 9000)
  world.scenario=NAME     the place; configs/world/vizdoom.yaml lists all keys
"""


class World:
    """One simulated place: opened as a whole, run by `run`, closed as a whole."""

    def __init__(self, settings: WorldSettings, parts: ExitStack) -> None:
        self._settings = settings
        self._started_s = time.monotonic()
        self._status = GameStatus()
        self._frames = Frames(settings.jpeg_quality)
        self._osc = parts.enter_context(closing(OscReceiver(settings.osc_host, settings.osc_port)))
        address = (settings.http_host, settings.http_port)
        camera = Camera(address, settings.client_limit, self._frames, self.state)
        self._camera = parts.enter_context(closing(camera))
        self._doom = parts.enter_context(DoomWorld(settings))
        self._exploration = self._measure_floor()
        self._osc.start()
        self._camera.start()

    def state(self) -> dict[str, Any]:
        uptime_s = time.monotonic() - self._started_s
        return report(self._status, self._camera.status, self._osc.counters, uptime_s)

    def run(self, stop: StopFlag) -> None:
        """Run tics on the time grid until asked to stop. If the engine hangs, this process ends."""
        threading.Thread(target=self._watch_engine, name="watch", daemon=True).start()
        tics = TicGrid(TIC_RATE, time.monotonic())
        shown = FrameGrid(self._settings.frame_rate, TIC_RATE)
        meter = RateMeter(RATE_WINDOW_TICS)
        count = 0
        while not stop.wait(tics.wait_s(time.monotonic())):
            meter.mark(time.monotonic())
            held = self._osc.take()
            moment = self._doom.step(movement(held, self._settings.gait))
            if shown.due(tics.index):
                self._frames.publish(moment.picture)
            count += 1
            self._note(moment, held, count, tics.skipped, meter.rate_hz())
            tics.advance(time.monotonic())

    def _watch_engine(self) -> None:
        watch = HangWatch(HANG_S, LOOK_S)
        while not watch.has_hung(self._status.tics, time.monotonic()):
            time.sleep(LOOK_S)
        log.error("the VizDoom engine has not answered for %.0f s: start this service again", HANG_S)
        leave(AmiError.exit_code)

    def describe(self) -> str:
        web = "http://{}:{}".format(*self._camera.server_address[:2])
        osc = "{}:{}".format(*self._osc.address)
        name = self._settings.scenario
        return f"world {name} is ready: camera {web}/video.mjpg, page {web}/, OSC on UDP {osc}"

    def _measure_floor(self) -> Exploration:
        moment, size = self._doom.moment(), self._settings.cell_size
        return Exploration(size, reachable_cells(self._doom.sectors(), (moment.x, moment.y), size))

    def _note(self, moment: Moment, held: HeldInputs, tics: int, late_tics: int, rate_hz: float) -> None:
        self._exploration.visit(moment.x, moment.y)
        self._status = GameStatus(
            position=Position(moment.x, moment.y, moment.z),
            angle_deg=moment.angle_deg,
            inputs=held,
            explored_share=self._exploration.share,
            explored_cells=self._exploration.visited,
            reachable_cells=len(self._exploration.reachable),
            tics=tics,
            episodes=self._doom.episodes,
            late_tics=late_tics,
            tic_rate_hz=rate_hz,
        )


def serve(argv: list[str], stop: StopFlag) -> None:
    if {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return
    settings = settings_from(load_config(argv).get("world"))
    with ExitStack() as parts:
        world = World(settings, parts)
        log.info("%s", world.describe())
        world.run(stop)


def main() -> None:
    run_command("world", serve)


if __name__ == "__main__":
    main()
