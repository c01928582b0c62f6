"""MLflow itself, with a sqlite store: its import alone takes seconds, so everything shares one store."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ami_controller.mlflow_process import MLflowProcess
from ami_controller.mlflow_run import METRIC_NAME_LENGTH, MLflowRun, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)

MakeRun = Callable[..., MLflowRun]
PollFor = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def make_run(folder: Path) -> MakeRun:
    def make(run_id: str | None = None, **changed: Any) -> MLflowRun:
        settings: dict[str, Any] = {
            "uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": "ami-test",
            "artifact_dir": str(folder / "artifacts"), "parameters": {"seed": 3, "long": "x" * 9_000},
        }  # fmt: skip
        return MLflowRun(**settings | changed, run_id=run_id)

    return make


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def test_a_run_begins_once_with_its_parameters(make_run: MakeRun, folder: Path) -> None:
    run = make_run()
    run.begin()
    run_id = run.run_id
    run.begin()
    assert run.run_id == run_id
    kept = client(folder).get_run(run.run_id)
    assert kept.data.params["seed"] == "3"
    assert len(kept.data.params["long"]) == 500
    assert client(folder).get_experiment(kept.info.experiment_id).name == "ami-test"


def test_points_arrive_with_step_and_time(make_run: MakeRun, folder: Path) -> None:
    run = make_run()
    run.begin()
    now = time.time()
    run.log_points([("body/late", 1.5, 10, now), ("body/late", 2.5, 20, now + 1)])
    run.log_points([("body/late", 2.5, 20, now + 1)])  # sent again after a failure that was none
    run.log_points([])
    history = client(folder).get_metric_history(run.run_id, "body/late")
    assert [(m.value, m.step, m.timestamp) for m in history] == [
        (1.5, 10, int(now * 1e3)),
        (2.5, 20, int((now + 1) * 1e3)),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "loss (train)",
        "a//b",
        "../../up",
        "KL μ",
        "",
        "/",
        "a/./b",
        "ends/",
        "new\nline",
        "x" * 400,
        "ok/µ-1.0: b",
        "%",
        "a\\b",
    ],
)
def test_a_point_of_any_name_is_taken(make_run: MakeRun, folder: Path, name: str) -> None:
    run = make_run()
    run.begin()
    run.log_points([(f"trainer/{name}", 1.0, 1, time.time()), (name, 1.0, 1, time.time())])
    assert client(folder).get_run(run.run_id).data.metrics[fit(f"trainer/{name}")] == 1.0


def test_a_usual_name_is_left_as_it_is() -> None:
    for name in ("image_vae/reconstruction_loss", "body/snapshot_age_s/image_encoder", "a b-c.d e"):
        assert fit(name) == name
    assert len(fit("x" * 999)) == METRIC_NAME_LENGTH


def test_a_colon_which_windows_refuses_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils import validation

    monkeypatch.setattr(validation, "is_windows", lambda: True)
    validation._validate_metric_name(fit("reward: of doors"))


def test_a_run_is_continued_after_a_restart(make_run: MakeRun, folder: Path) -> None:
    first = make_run()
    first.begin()
    first.log_points([("x", 1.0, 1, 1.0)])
    first.finish()
    assert client(folder).get_run(first.run_id).info.status == "FINISHED"
    second = make_run(first.run_id)
    second.begin()
    second.log_points([("x", 2.0, 2, 2.0)])
    assert second.run_id == first.run_id
    assert client(folder).get_run(first.run_id).info.status == "RUNNING"
    assert len(client(folder).get_metric_history(first.run_id, "x")) == 2


def test_a_run_that_is_gone_gives_way_to_a_new_one(make_run: MakeRun, folder: Path) -> None:
    unknown = make_run("0" * 32)
    unknown.begin()
    deleted = make_run()
    deleted.begin()
    client(folder).delete_run(deleted.run_id)
    after = make_run(deleted.run_id)
    after.begin()
    assert len({unknown.run_id, deleted.run_id, after.run_id, "0" * 32}) == 4


def test_a_run_deleted_while_it_is_written_to_gives_way_to_a_new_one(make_run: MakeRun, folder: Path) -> None:
    run = make_run()
    run.begin()
    deleted = run.run_id
    client(folder).delete_run(deleted)
    run.begin()
    run.log_points([("body/loss", 1.0, 1, 1.7e9)])
    assert run.run_id != deleted
    assert client(folder).get_run(run.run_id).data.params["seed"] == "3"


def test_a_server_that_is_down_does_not_make_a_run_forgotten(make_run: MakeRun) -> None:
    first = make_run()
    first.begin()
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        again = make_run(first.run_id, uri=f"http://127.0.0.1:{taken.getsockname()[1]}", artifact_dir=None)
        for _ in range(2):
            with pytest.raises(Exception, match=r"(?i)connection|failed"):
                again.begin()
        assert again.run_id == first.run_id
    again.uri = first.uri
    again.begin()
    assert again.run_id == first.run_id


def test_pictures_are_artifacts(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    run = make_run()
    picture = tmp_path / "view-1.png"
    picture.write_bytes(b"png")
    run.begin()
    run.log_artifact(str(picture))
    run.log_artifact(str(tmp_path / "gone.png"))
    assert [a.path for a in client(folder).list_artifacts(run.run_id, "pictures")] == ["pictures/view-1.png"]
    assert list((folder / "artifacts").rglob("view-1.png"))


def test_a_run_s_folder_may_be_moved(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before it", tmp_path / "after it"

    def go_on(place: Path, picture: str, run_id: str | None) -> str | None:
        """Use a process of its own, for MLflow remembers where a run's artifacts are."""
        (tmp_path / picture).write_bytes(b"png")
        uri = f"sqlite:///{place / 'mlflow.db'}"
        process = MLflowProcess(uri, "ami-test", place / "artifacts", {}, run_id, lambda run_id: None)
        process.queue_artifact(tmp_path / picture)
        process.send_artifacts()
        process.close()
        return process.run_id

    make_run().begin()
    before.mkdir()
    shutil.copy(folder / "mlflow.db", before / "mlflow.db")  # a copy: the other's place exists still
    run_id = go_on(before, "view-1.png", None)
    before.rename(after)
    assert go_on(after, "view-2.png", run_id) == run_id
    told = client(after).list_artifacts(run_id, "pictures")
    assert [a.path for a in told] == ["pictures/view-1.png", "pictures/view-2.png"]
    assert len(list(after.rglob("view-?.png"))) == 2
    assert not before.exists()


def test_a_store_whose_making_is_killed_is_made_anew(make_run: MakeRun, tmp_path: Path, poll_for: PollFor) -> None:
    path = tmp_path / "mlflow.db"
    making = (
        "import os; from ami_controller import mlflow_run;"
        "mlflow_run.rename = lambda *_: os._exit(9);"
        f"mlflow_run.MLflowRun('sqlite:///{path}', 'ami-test', '{tmp_path}', {{}}, None).begin()"
    )

    def half_made() -> bool:
        return any(file.stat().st_size > 300_000 for file in tmp_path.rglob("*.db"))  # of 950,000

    with subprocess.Popen([sys.executable, "-c", making]) as process:
        poll_for(lambda: process.poll() is not None or half_made(), 60.0)
        process.kill()
    assert half_made()
    assert not path.exists(), "built in its place"
    run = make_run(uri=f"sqlite:///{path}", artifact_dir=str(tmp_path))
    run.begin()
    run.log_points([("x", 1.0, 1, 1.0)])
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_values_keep_their_precision(make_run: MakeRun, folder: Path) -> None:
    run = make_run()
    run.begin()
    run.log_points([("pi", math.pi, 1, 1.0)])
    assert client(folder).get_run(run.run_id).data.metrics["pi"] == math.pi
