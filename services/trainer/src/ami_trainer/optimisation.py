"""Guarded gradient steps: clipped, skipped if anything is not finite, with the last good parameters as a fallback."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import WireError
from ami_shared.wire import Array
from ami_trainer.data_parallel import Batch, Followed, Losses, LossesOf, SharedGradient, Team

log = logging.getLogger(__name__)

KEEP_EVERY = 100


class GuardedOptimiser:
    """Steps an optimiser if loss and gradients are finite; otherwise skips the step and counts it.

    After `patience` skipped steps in a row the last good parameters are restored, and the optimiser's moments reset;
    the same happens if parameters or buffers themselves are not finite, which is checked at intervals. A skipped step
    leaves no trace: buffers (batch norm) are reset to their values after the last step.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        clip_norm: float | None = None,
        patience: int = 10,
    ) -> None:
        """Remember the present parameters as the last good ones.

        Args:
            modules: name → module, of everything that a step changes.
            optimiser: of their parameters.
            clip_norm: largest norm of the gradient; None = not clipped.
            patience: skipped steps in a row after which the last good parameters are restored.
        """
        self._modules, self._optimiser = dict(modules), optimiser
        self._clip_norm = clip_norm
        self._patience = patience
        self._in_a_row = 0
        self._shared: SharedGradient | None = None
        self._good, self._buffers = self._copy(), self._copy_buffers()
        for module in self._modules.values():
            module.register_load_state_dict_post_hook(self._loaded)  # type: ignore[no-untyped-call]
        self.steps = self.skipped = self.restored = 0

    def share(self, team: Team, losses_of: LossesOf, followed: Followed | None = None) -> None:
        """Let several processes compute the gradient of step_on(), see ami_trainer.data_parallel."""
        modules = list(self._modules.values())
        self._shared = SharedGradient(team, modules, self._parameters(), losses_of, followed)

    def step_on(self, batch: Batch, losses_of: LossesOf) -> dict[str, float]:
        """Take one gradient step on a minibatch; return its losses, grad_norm, and skipped = 1 if there was none.

        Args:
            batch: the minibatch, on the device.
            losses_of: returns the mean losses over a minibatch or a share of it; the one called `loss` is minimised.
        """
        self._optimiser.zero_grad(set_to_none=True)
        if self._shared:
            return self._take(self._shared.of(batch))
        losses = losses_of(batch)
        torch.autograd.backward(losses["loss"])
        return self._take(losses)

    def _take(self, losses: Losses) -> dict[str, float]:
        """Step along the parameters' present gradients; all numbers are fetched from the device at once."""
        norm = self._clip()
        told = torch.stack([norm, *(loss.detach().float() for loss in losses.values())]).tolist()
        numbers = dict(zip(losses, told[1:], strict=True))
        for name, number in (("loss", numbers["loss"]), ("gradient norm", told[0])):
            if not math.isfinite(number):
                return numbers | self._skip(f"{name} {number}")
        self._optimiser.step()
        self.steps += 1
        self._in_a_row = 0
        self._buffers = self._copy_buffers()
        if self.steps % KEEP_EVERY == 0:
            if self._finite(self._tensors()):
                self._keep_good()
            else:
                self._go_back("parameters or buffers are not finite")
        return numbers | {"grad_norm": told[0], "skipped": 0.0}

    def _clip(self) -> Tensor:
        """Scale the gradient down to the largest norm; return the norm that it had."""
        parameters = self._parameters()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return norm

    @torch.no_grad()
    def _keep_good(self) -> None:
        """Remember the present parameters, reusing the memory of the remembered ones."""
        for name, module in self._modules.items():
            for key, tensor in module.state_dict().items():
                self._good[name][key].copy_(tensor)

    def _loaded(self, module: nn.Module, incompatible_keys: object) -> None:
        """Take parameters that are loaded from outside as the last good ones."""
        self._keep_good()
        self._buffers = self._copy_buffers()

    def _skip(self, why: str) -> dict[str, float]:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            log.warning("gradient step skipped: %s is not finite (%d skipped so far)", why, self.skipped)
        self._restore(self._buffers)
        if self._in_a_row >= self._patience:
            self._go_back(f"{self._patience} steps in a row were not finite")
        return {"skipped": 1.0}

    def _go_back(self, why: str) -> None:
        self._restore(self._good)
        self._buffers = self._copy_buffers()
        self.restored += 1
        self._in_a_row = 0
        self._optimiser.state.clear()
        log.warning("%s: restored the last good parameters", why)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimiser.param_groups for parameter in group["params"]]

    def _tensors(self) -> Iterable[Tensor]:
        return (tensor for module in self._modules.values() for tensor in module.state_dict().values())

    @staticmethod
    def _finite(tensors: Iterable[Tensor]) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())

    def _copy(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
            for name, module in self._modules.items()
        }

    def _copy_buffers(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: buffer.detach().clone() for key, buffer in module.named_buffers()}
            for name, module in self._modules.items()
        }

    @torch.no_grad()
    def _restore(self, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, module in self._modules.items():
            tensors = {**module.state_dict(), **dict(module.named_buffers())}
            for key, tensor in kept[name].items():
                tensors[key].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """Return the optimiser's moments and the counters; arrays are views where tensors are on the CPU."""
        moments = {
            str(n): {name: _on_host(value.detach()) for name, value in kept.items()}
            for n, parameter in enumerate(self._parameters())
            if (kept := self._optimiser.state.get(parameter))
        }
        return {"moments": moments, "steps": self.steps, "skipped": self.skipped, "restored": self.restored}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the moments of an earlier process; settings such as the learning rate stay the configured ones.

        Raises:
            WireError: a moment does not fit its parameter; nothing has been changed.
        """
        parameters = self._parameters()
        moments: dict[Tensor, dict[str, Tensor]] = {}
        for n, kept in state["moments"].items():
            if int(n) >= len(parameters):
                raise WireError(f"moments of parameter {n}, of {len(parameters)} in all")
            parameter = parameters[int(n)]
            moments[parameter] = {name: _moment(name, np.array(value), parameter) for name, value in kept.items()}
        self._optimiser.state.clear()
        self._optimiser.state.update(moments)
        self.steps, self.skipped, self.restored = (int(state[name]) for name in ("steps", "skipped", "restored"))

    def statistics(self) -> Mapping[str, Any]:
        """Return counters for the status."""
        return {"skipped": self.skipped, "restored": self.restored}


def fused_if_possible(*modules: nn.Module) -> bool | None:
    """Return Adam's argument `fused` for these modules: on a CPU one pass over memory is several times as fast.

    None leaves the choice to torch: on GPUs, and where a parameter is not of real floating-point numbers.
    """
    parameters = (parameter for module in modules for parameter in module.parameters())
    return all(p.device.type == "cpu" and p.is_floating_point() for p in parameters) or None


def _on_host(value: Tensor) -> Array:
    """Return a view of a tensor on the CPU, or a copy of one on a GPU, marked as such."""
    array: Array = value.cpu().numpy()
    if value.device.type != "cpu":
        array.flags.writeable = False
    return array


def _moment(name: str, value: Array, parameter: nn.Parameter) -> Tensor:
    """Return a moment on its parameter's device; step counters stay on the CPU, as in torch."""
    if value.ndim == 0:
        return torch.from_numpy(value)
    if value.shape != tuple(parameter.shape):
        raise WireError(f"{name} {list(value.shape)} does not fit a parameter {list(parameter.shape)}")
    return torch.from_numpy(value).to(parameter.device)
