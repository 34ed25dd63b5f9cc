"""Several processes that carry out one command together, and what they tell each other.

    torchrun --nproc-per-node 2 -m gossamer apply ...

starts them; rank 0 leads: it alone writes the run folder, measures and prints. The others follow it through the steps
in which work is shared. What crosses the wire is JSON and the bytes of tensors, no pickle, in an order in which every
process takes part. A process that dies takes the others with it: torchrun ends them, or the broken connection does.

One process alone is a team too, in which nothing is sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gossamer.errors import RunError
from gossamer.run.fingerprint import Json

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=30)  # the leader measures for hours while the others wait; a death breaks the connection
STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torchrun tells each process
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Team:
    """Say which process of how many this is, and of those on this machine (`local`), and pass things between them."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Say whether this process writes and prints."""
        return self.rank == 0

    def everywhere(self, value: Json = None, source: int = 0) -> Any:
        """Return the JSON value that the process of rank `source` gave; what the others give is not looked at."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        words = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(words)])
        dist.broadcast(length, source)
        text = torch.frombuffer(bytearray(words), dtype=torch.uint8) if words else None
        text = text if text is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, source)
        return json.loads(text.numpy().tobytes())

    def gathered(self, value: Json) -> list[Any]:
        """Return what every process gave, by rank."""
        return [self.everywhere(value, source) for source in range(self.size)]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor that lies in a row with that of the process of rank `source`."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, source)

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand a tensor to the process of rank `to`, which waits in `receive`."""
        import torch.distributed as dist

        dist.send(tensor.contiguous(), to)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor that lies in a row with what the process of rank `source` sends."""
        import torch.distributed as dist

        dist.recv(tensor, source)


ALONE = Team()


def num_processes() -> int:
    """Return how many processes were started to carry out this command together."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in STARTED) else 1


def started_rank() -> int:
    """Return which of them this one is, before they are connected."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


@contextmanager
def assembled() -> Iterator[Team]:
    """Yield the team of the processes that were started together, connected; alone, a team of one.

    After an error nobody waits for anybody: the process ends, and that ends the others. Raises RunError in these.
    """
    if num_processes() == 1:
        yield Team()
        return
    import torch.distributed as dist

    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))
    ours = not dist.is_initialized()
    if ours:
        _connect(alone_here=here == num_processes())
    try:
        rank = dist.get_rank()
        yield Team(rank, dist.get_world_size(), here, int(os.environ.get("LOCAL_RANK", rank % here)))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise RunError(
            "the connection to another process broke: it ended",
            "it says why, unless it was killed; the same command goes on from what is finished",
        ) from error
    if ours:
        dist.destroy_process_group()


def _connect(*, alone_here: bool) -> None:
    """Connect this process with the others; `alone_here` says that all are on this machine.

    torchrun keeps one store over its restarts, with the addresses of processes that are gone: those of each start get
    names of their own. (On many machines its counts differ, and it may have other stores.)
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    if alone_here:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # this machine's name need not lead anywhere
        start = f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]  # public, in no __all__
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
