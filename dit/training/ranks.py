"""The processes that train one model together, as torchrun starts them; one process is the simplest case of it."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditscale.dit.model import DiT
from ditscale.dit.training.execution import Execution
from ditscale.errors import InputError

T = TypeVar("T")
# Long enough for a first step that compiles on every rank at its own pace.
_TIMEOUT = datetime.timedelta(minutes=30)
# Of the first rank's work alone: reading a large data set once to hash it takes hours. One that ended is noticed at once.
_PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """This process among those that train together.

    Attributes:
        rank, count: which of how many.
        device: where this process computes.
        mode: "none", "ddp", "fsdp" or "hsdp".
    """

    def __init__(self, execution: Execution) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.device = _device(execution)
        self.mode = "none"
        self._mesh: Any = None
        if self.count > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self.mode = "ddp" if execution.parallel == "auto" else execution.parallel
        if self.mode in ("fsdp", "hsdp"):
            self._mesh = self._make_mesh(execution.shard_ranks)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to people."""
        return self.rank == 0

    def _make_mesh(self, shard_ranks: int | None) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self.mode == "fsdp":
            return init_device_mesh(self.device.type, (self.count,))
        size = shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        if self.count % size:
            raise InputError(f"execution.shard_ranks: expected a divisor of {self.count} processes, got {size}")
        return init_device_mesh(self.device.type, (self.count // size, size), mesh_dim_names=("replicate", "shard"))

    def distribute(self, model: DiT) -> nn.Module:
        """Spread a model's blocks over the ranks, in place; the module to call, which may be a wrapper of it."""
        if self.mode == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.mode != "none":
            from torch.distributed.fsdp import fully_shard

            # Gates, which blocks hand on, are parts of one projection; nobody writes them in place.
            kinds = "|".join(sorted({f"FSDP{type(module).__name__}" for module in (model, *model.blocks)}))
            warnings.filterwarnings(
                "ignore", rf"FSDP2-wrapped module \(({kinds})\) returned a view tensor", UserWarning
            )
            for block in model.blocks:
                fully_shard(block, mesh=self._mesh)
            fully_shard(model, mesh=self._mesh)
        return model

    @contextlib.contextmanager
    def local_gradients(self, called: nn.Module, model: nn.Module) -> Iterator[None]:
        """While this lasts, backward passes add up gradients without exchanging them."""
        if self.mode == "ddp":
            with called.no_sync():  # type: ignore[operator]
                yield
        elif self.mode != "none":
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        else:
            yield

    def rows(self, count: int) -> slice:
        """This rank's share of ``count`` rows, which the number of ranks divides."""
        share = count // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum_squares(self) -> Callable[[Tensor], Tensor] | None:
        """Adds up squares over the ranks that share one copy of the weights; None where each has all of them."""
        if self._mesh is None:
            return None
        group = self._mesh.get_group("shard" if self.mode == "hsdp" else None)

        def summed(value: Tensor) -> Tensor:
            dist.all_reduce(value, group=group)
            return value

        return summed

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def on_first(self, work: Callable[[], T]) -> T:
        """What the first rank's work returns, or the InputError it raises, on every rank."""
        if self.count == 1:
            return work()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except InputError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self._patient, device=torch.device("cpu"))
        if box[1] is not None:
            raise InputError(box[1])
        return box[0]

    def gather(self, value: T) -> list[T]:
        """One value of every rank, on every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found


@contextlib.contextmanager
def started(execution: Execution) -> Iterator[Ranks]:
    """The ranks of this run; joins the processes that torchrun started, and leaves them at the end.

    Raises:
        InputError: the device that was asked for is not there.
    """
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    device = _device(execution)
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device if device.type == "cuda" else None)
    try:
        yield Ranks(execution)
    finally:
        if own:
            dist.destroy_process_group()


def _device(execution: Execution) -> torch.device:
    there = torch.cuda.is_available()
    if execution.device == "cuda" and not there:
        raise InputError("execution.device: expected a device that is here, got cuda, of which torch sees none")
    if execution.device == "cpu" or not there:
        return torch.device("cpu")
    # Torchrun numbers the processes of a machine; so does a study's pool, whose processes train apart.
    place = int(os.environ.get("LOCAL_RANK") or os.environ.get("DITSCALE_PLACE") or 0)
    device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
