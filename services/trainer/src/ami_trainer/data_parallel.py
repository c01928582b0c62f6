"""Data parallel training: the processes of one trainer, started by torchrun, share every minibatch.

Rank 0 is the service. It alone has sockets, buffer and optimiser; the others only compute. With each step it sends them
the parameters, the modules' buffers and the minibatch; every rank processes its share, and the gradients are summed at
rank 0, which guards, clips and steps. This is the simplest robust scheme: since the other ranks have no state, nothing
drifts apart, a skipped step is skipped everywhere, and what replaces parameters at rank 0 (a checkpoint, a snapshot,
the last good parameters) reaches all with the next step. It sends as much as if all ranks stepped alike: parameters one
way and gradients the other, instead of a sum of gradients both ways.

Batch norm: each rank normalises by the statistics of its own share, and the running statistics that are kept and
published are those of rank 0's share. So a share should be no smaller than a minibatch of one process may be.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ami_shared.errors import AmiError, ConfigurationError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
Losses = Mapping[str, Tensor]
LossesOf = Callable[[Batch], Losses]
Followed = Callable[[], tuple[int, nn.Module]]

STEP_PATIENCE = timedelta(minutes=10)  # while all are working; the first step may have to compile
IDLE_PATIENCE = timedelta(days=3650)  # a pause has no limit; a process that has ended is noticed all the same
ORDER_BYTES = 4096
MOST_LOSSES = 16


@dataclass(frozen=True)
class Order:
    """What rank 0 wants the others to do next.

    Attributes:
        end: whether to stop.
        refill: whether parameters of the followed model are sent too.
        seed: of this step's random numbers, so that a restored run draws the same ones.
        forms: dtype and shape of each part of the minibatch.
    """

    end: bool = False
    refill: bool = False
    seed: int = 0
    forms: Sequence[tuple[str, Sequence[int]]] = ()

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(ORDER_BYTES)

    @classmethod
    def from_bytes(cls, content: bytes) -> Order:
        return cls(**json.loads(content))


class Team:
    """The processes of one trainer, and their communication."""

    def __init__(self, backend: str) -> None:
        """Find the other processes, as torchrun's environment describes.

        Args:
            backend: for parameters and gradients: gloo or nccl. Orders use gloo, which can wait without a limit.

        Raises:
            AmiError: they cannot be found.
        """
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self._dist = dist
        with _together("the processes of this trainer did not find each other"):
            store, rank, size = next(rendezvous("env://", timeout=STEP_PATIENCE))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store keeps addresses of earlier attempts
            store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=STEP_PATIENCE, store=store, rank=rank, world_size=size)
            self._orders = dist.new_group(backend="gloo", timeout=IDLE_PATIENCE)
        self.rank, self.size = rank, size
        self._in_step = False
        self.carry_out: Callable[[Order], None] | None = None

    def work(self) -> None:
        """Carry out rank 0's orders until it ends.

        Raises:
            AmiError: it ended without an order to stop.
        """
        assert self.carry_out
        log.info("rank %d of %d takes its share of every minibatch", self.rank, self.size)
        while not (order := self._hear()).end:
            self.carry_out(order)

    def order(self, order: Order) -> None:
        """Send an order to all others.

        Raises:
            AmiError: one of them is gone.
        """
        self._in_step = not order.end
        with _together(self._lost):
            self._dist.broadcast(torch.frombuffer(bytearray(order.to_bytes()), dtype=torch.uint8), 0, self._orders)

    def _hear(self) -> Order:
        content = torch.empty(ORDER_BYTES, dtype=torch.uint8)
        with _together(self._lost):
            self._dist.broadcast(content, 0, self._orders)
        return Order.from_bytes(content.numpy().tobytes())

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors from rank 0 to all ranks.

        Raises:
            AmiError: another rank is gone.
        """
        parts = [_bytes_of(tensor) for tensor in tensors]
        sizes = [len(part) for part in parts]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=parts[0].device) if self.rank else torch.cat(parts)
        with _together(self._lost):
            self._dist.broadcast(flat, 0)
        if self.rank:
            for part, came in zip(parts, torch.split(flat, sizes), strict=True):
                part.copy_(came)

    def sum_up(self, numbers: Tensor) -> None:
        """Sum a tensor over all ranks; rank 0 gets the result, in place.

        Raises:
            AmiError: another rank is gone.
        """
        with _together(self._lost):
            self._dist.reduce(numbers, 0)
        self._in_step = False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Order all others to stop. In the middle of a step they would not notice: closed connections tell them.

        Raises:
            AmiError: one of them was already gone, and no other error is being raised.
        """
        if self._in_step:
            return
        try:
            self.order(Order(end=True))
        except AmiError:
            if kind is None:
                raise

    @property
    def _lost(self) -> str:
        who = "rank 0" if self.rank else "another process"
        return f"data parallel: {who} of this trainer is gone, so this one ends too; start all of them again"


class SharedGradient:
    """The gradient of one minibatch, computed by all ranks."""

    def __init__(
        self,
        team: Team,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        losses_of: LossesOf,
        followed: Followed | None = None,
    ) -> None:
        """Prepare the computation, on every rank alike.

        Args:
            team: the processes.
            modules: the modules on whose parameters and buffers the losses depend.
            parameters: the parameters for which gradients are computed.
            losses_of: returns the mean losses over a minibatch; the one called `loss` is minimised.
            followed: returns version and module of another trainer's model on which the losses depend.
        """
        self._team, self._parameters, self._losses_of = team, parameters, losses_of
        self._state = [tensor for module in modules for tensor in _tensors(module)]
        self._followed, self._sent_version = followed, 0
        team.carry_out = self._carry_out

    def of(self, batch: Batch) -> Losses:
        """Compute the parameters' gradients, and return the losses over the whole minibatch. For rank 0.

        Raises:
            AmiError: another rank is gone.
        """
        batch = tuple(part.contiguous() for part in batch)
        forms = tuple((str(part.dtype).removeprefix("torch."), tuple(part.shape)) for part in batch)
        refill = self._followed is not None and self._followed()[0] != self._sent_version
        self._team.order(Order(False, refill, int(torch.randint(1 << 60, ())), forms))
        self._spread(batch, refill)
        return self._shared(batch)

    def _carry_out(self, order: Order) -> None:
        torch.manual_seed(order.seed + self._team.rank)
        device = self._parameters[0].device
        batch = tuple(torch.empty(tuple(n), dtype=getattr(torch, name), device=device) for name, n in order.forms)
        self._spread(batch, order.refill)
        for parameter in self._parameters:
            parameter.grad = None
        self._shared(batch)

    def _spread(self, batch: Batch, refill: bool) -> None:
        more: list[Tensor] = []
        if refill and self._followed:
            self._sent_version, module = self._followed()
            more = _tensors(module)
        self._team.spread([*self._state, *batch, *more])

    def _shared(self, batch: Batch) -> Losses:
        """Compute this rank's share, and sum: the mean over the minibatch is the weighted sum of the shares' means."""
        rank, size = self._team.rank, self._team.size
        share = tuple(part.tensor_split(size)[rank] for part in batch)
        weight = len(share[0]) / len(batch[0])
        sums = torch.zeros(MOST_LOSSES, device=batch[0].device)
        losses: Losses = {}
        if weight:
            losses = self._losses_of(share)
            torch.autograd.backward(losses["loss"] * weight)
            sums[: len(losses)] = torch.stack([loss.detach().float() for loss in losses.values()]) * weight
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = torch.cat([sums, *(gradient.view(-1) for gradient in gradients)])
        self._team.sum_up(flat)
        sums, *summed = torch.split(flat, [MOST_LOSSES, *(gradient.numel() for gradient in gradients)])
        for parameter, gradient in zip(self._parameters, summed, strict=True):
            if parameter.grad is not None:
                parameter.grad = gradient.view_as(parameter)
        return dict(zip(losses, sums, strict=False))


def form_team(device: str) -> Team | None:
    """Return the team in which torchrun started this process; None without torchrun, without torch.distributed.

    Args:
        device: on which the trainer computes: cpu, or cuda: each process takes the GPU of its local rank.

    Raises:
        ConfigurationError: there is no such device for each of the processes.
        AmiError: the processes cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"trainers.NAME.device={device!r} must be cpu or cuda when torchrun starts several processes"
        )
    if device == "cpu":
        return Team("gloo")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ConfigurationError(
            f"trainers.NAME.device=cuda: no GPU for process {local} of this machine, which has {count}"
        )
    if not torch.distributed.is_nccl_available():
        raise ConfigurationError("trainers.NAME.device=cuda: several processes need NCCL, which exists only on Linux")
    torch.cuda.set_device(local)
    return Team("nccl")


def processes_here() -> int:
    """Return the number of this trainer's processes that share this machine's cores."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_with(team: Team, trainer: Any, where: str) -> None:
    """Let a trainer share its minibatches with a team.

    Args:
        team: the processes.
        trainer: the trainer.
        where: its section of the configuration, for the error message.

    Raises:
        ConfigurationError: the trainer has no share().
    """
    if not hasattr(trainer, "share"):
        raise ConfigurationError(
            f"{where}: {type(trainer).__name__} has no share() and cannot be trained by several processes: "
            "start it without torchrun"
        )
    trainer.share(team)


@contextmanager
def _together(otherwise: str) -> Iterator[None]:
    """Turn an error of torch.distributed into an AmiError of one line that begins with `otherwise`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = re.sub(r"^\[\S+\] |\. This is .*", "", " ".join(str(error).split()))
        raise AmiError(f"{otherwise} ({reason:.160})") from None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
