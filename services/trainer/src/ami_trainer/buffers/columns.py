"""Which columns of the records a buffer keeps, and their forms: as required, else as in the first records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ami_shared.errors import WireError
from ami_shared.records import RecordBatch
from ami_shared.wire import Array

Form = tuple[np.dtype[np.generic], tuple[int, ...]]


def form(dtype: type[np.generic], *shape: int) -> Form:
    """Return the form of a column: the dtype and shape of each record's value."""
    return np.dtype(dtype), shape


def observation_form(encoder: object) -> dict[str, Form]:
    """Return the form of an encoder's frames, if it has an `observation_shape`: see ami_shared.models.vae."""
    shape = getattr(encoder, "observation_shape", None)
    return {"observation": form(np.uint8, *shape)} if shape else {}


class Columns:
    """One form for the records of all bodies, so that they can be sampled together."""

    def __init__(
        self,
        names: Sequence[str],
        required: Mapping[str, Form] | None = None,
        choices: Sequence[int] | None = None,
    ) -> None:
        """Define the columns.

        Args:
            names: of the columns.
            required: column → form, of those whose form is known in advance.
            choices: number of choices of each action dimension, if there is a column `action`.
        """
        self.names = tuple(names)
        self._forms = dict(required or {})
        self._choices = choices
        if choices is not None:
            self._forms["action"] = form(np.int64, len(choices))

    def of(self, batch: RecordBatch) -> dict[str, Array]:
        """Return the batch's columns.

        Raises:
            WireError: a column is missing or has another form, or an action is not one of the choices; such a batch
                does not determine any form.
        """
        self.take_form(batch.body, batch.data)
        return {name: batch.data[name] for name in self.names}

    def take_form(self, body: str, data: Mapping[str, Array]) -> None:
        """Check that a body's columns have the same form as all others; the first ones determine it.

        Raises:
            WireError: a column is missing or has another form, or an action is not one of the choices.
        """
        if missing := [name for name in self.names if name not in data]:
            raise WireError(f"records of {body} carry no {', '.join(missing)}")
        came = {name: (data[name].dtype, data[name].shape[1:]) for name in self.names}
        for name, (dtype, shape) in came.items():
            expected, sizes = self._forms.get(name, (dtype, shape))
            if (dtype, shape) != (expected, sizes):
                raise WireError(f"{name} {dtype}{list(shape)} of {body} is not {expected}{list(sizes)}")
        if self._choices is not None and ((data["action"] < 0) | (data["action"] >= np.asarray(self._choices))).any():
            raise WireError(f"action of {body} outside the choices {tuple(self._choices)}")
        self._forms = came
