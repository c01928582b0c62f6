"""The one MLflow run of a system: begun once, continued after every restart of the controller.

It is used in the process of `mlflow_process.py`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ami_shared.files import rename, sync_folder
from ami_shared.uris import sqlite_uri

PARAMETER_LENGTH = 500
METRIC_NAME_LENGTH = 250
RUN_IS_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # never existed, or deleted


class MLflowRun:
    """Calls MLflow. Every method may raise whatever MLflow raises; none leaves half-done state."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_dir: str | None,
        parameters: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        """Remember what to log and where; nothing is contacted before begin().

        Args:
            uri: MLflow's tracking URI.
            experiment: name of the MLflow experiment.
            artifact_dir: where a sqlite store keeps its artifacts; a server decides for itself.
            parameters: of the run, logged when it begins.
            run_id: the run to continue, if there is one.
        """
        self.uri, self.run_id = uri, run_id
        self._experiment, self._artifact_dir = experiment, artifact_dir
        self._parameters = dict(parameters)
        self._client: Any = None
        self._parameters_due = False

    def begin(self) -> None:
        """Import MLflow, and continue the run, or begin a new one if it is gone; `run_id` tells which."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import logging

        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        _build_store(self.uri)
        if self._artifact_dir:
            _move_artifacts(self.uri, self._experiment, Path(self._artifact_dir))
        client = MlflowClient(tracking_uri=self.uri)
        if self.run_id:
            try:
                client.update_run(self.run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code not in RUN_IS_GONE:
                    raise  # a server that is down still has the run
                self.run_id = None
        if not self.run_id:
            self.run_id = self._create(client)
            self._parameters_due = True
        if self._parameters_due:
            for name, value in self._parameters.items():
                client.log_param(self.run_id, name, str(value)[:PARAMETER_LENGTH])
            self._parameters_due = False
        self._client = client

    def _create(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        where = Path(self._artifact_dir).resolve().as_uri() if self._artifact_dir else None
        identity = found.experiment_id if found else client.create_experiment(self._experiment, artifact_location=where)
        return str(client.create_run(identity, run_name=self._experiment).info.run_id)

    def log_points(self, points: Sequence[tuple[str, float, int, float]]) -> None:
        """Log (name, value, step, seconds since the epoch)."""
        from mlflow.entities import Metric

        metrics = [Metric(fit(name), value, int(time_s * 1000), step) for name, value, step, time_s in points]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)

    def log_artifact(self, path: str) -> None:
        """Log a picture, if its file still exists."""
        if Path(path).exists():
            self._client.log_artifact(self.run_id, path, "pictures")

    def finish(self) -> None:
        """Mark the run as finished for now."""
        self._client.set_terminated(self.run_id)


def _build_store(uri: str) -> None:
    """Let MLflow build a sqlite store elsewhere, then move it into place: it never repairs half-built ones."""
    if not uri.startswith("sqlite:"):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    if database in (None, "", ":memory:") or (path := Path(database)).exists():
        return
    aside = path.with_name(f"{path.name}.building")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    begun = aside / path.name
    SqlAlchemyStore(sqlite_uri(begun), str(path.parent / "artifacts")).engine.dispose()
    rename(begun, path)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _move_artifacts(uri: str, experiment: str, to: Path) -> None:
    """Let an experiment's runs have their artifacts in a folder: a sqlite store keeps the absolute place of old."""
    from sqlalchemy import create_engine, text

    where, engine = to.resolve().as_uri(), create_engine(uri)
    with engine.begin() as connection:
        about: dict[str, Any] = {"experiment": experiment, "to": where}
        moved = "SELECT experiment_id, artifact_location FROM experiments WHERE name = :experiment"
        for identity, before in connection.execute(text(f"{moved} AND artifact_location <> :to"), about).all():
            relocate = "UPDATE runs SET artifact_uri = :to || substr(artifact_uri, :length + 1)"
            those = "WHERE experiment_id = :identity AND substr(artifact_uri, 1, :length) = :before"
            about |= {"identity": identity, "before": before, "length": len(before)}
            connection.execute(text(f"{relocate} {those}"), about)
            place = "UPDATE experiments SET artifact_location = :to WHERE experiment_id = :identity"
            connection.execute(text(place), about)
    engine.dispose()


def in_a_line(error: Exception) -> str:
    """Return an error's message as one line: MLflow's have many."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def fit(name: str) -> str:
    """Return a metric's name without what MLflow refuses anywhere: one bad name would block all others for good."""
    parts = (re.sub(r"[^\w. -]", "_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)[:METRIC_NAME_LENGTH].rstrip("/")
