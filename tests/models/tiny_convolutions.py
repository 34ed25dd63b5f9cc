"""Small convolutional networks of every structure that channels run through, and some whose channels cannot be cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, size: int = 3, **more: int) -> nn.Sequential:
    """Return convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act, self.head = conv(3, 8), nn.Conv2d(8, 12, 3), nn.PReLU(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.two(self.one(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = conv(3, 8), conv(8, 6), nn.Conv2d(6, 8, 1)
        self.same, self.scale = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.ones(8, 1, 1))
        self.down, self.short, self.head = conv(8, 10, stride=2), nn.Conv2d(8, 10, 1, stride=2), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.outer(self.inner(x))
        x = torch.relu(x + self.same(x))  # reads and writes the stream
        x = self.down(x) + self.short(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.deep = conv(3, 6), conv(6, 12, 1), conv(12, 12, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.head = conv(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(self.expand(x))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Joined(nn.Module):
    """A U: what goes down is joined to what comes up; two branches are joined and then added to one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 10)
        self.up, self.left, self.right, self.whole = conv(18, 8), conv(8, 4), conv(8, 6), conv(8, 10)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = F.interpolate(self.second(F.max_pool2d(skip, 2)), scale_factor=2.0)
        x = self.up(torch.cat([x, skip], 1))
        return self.head(torch.cat([self.left(x), self.right(x)], 1) + self.whole(x))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.hidden, self.head = conv(3, 8), conv(8, 6), nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.two(self.one(x)), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 8), conv(8, 20, groups=4), conv(20, 12, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(x))).mean((2, 3)))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Linear(6, 5)
        self.norm = nn.InstanceNorm1d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean(2))


class Mixed(nn.Module):
    """Only the last convolution's inputs can be fewer: everything else is looked at across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.three = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), conv(8, 8), conv(8, 8)
        self.four, self.head, self.lift = nn.Conv2d(8, 6, 3), nn.Linear(6, 5), nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(x)))
        x = self.three(torch.softmax(x, 1))
        return self.head(self.four(self.lift(x)).mean((2, 3)))


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(self.two(x).mean((2, 3)))


NETWORKS: dict[Callable[[], nn.Module], dict[str, int]] = {  # -> its dimensions
    Plain: {"one.0": 8, "two": 12},
    Residual: {"stem.0": 8, "inner.0": 6, "down.0": 10},
    Separable: {"stem.0": 6, "expand.0": 12, "squeeze": 4},
    Joined: {"first.0": 8, "second.0": 10, "up.0": 8, "left.0": 4, "right.0": 6},
    Flattened: {"one.0": 8, "two.0": 6, "hidden": 10},
    Grouped: {"one.0": 2, "two.0": 5, "three.0": 6},
    Signal: {"one": 8, "two": 6},
    Mixed: {"four": 6},
}


def built(network: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with weights, norms and what norms have seen all random."""
    torch.manual_seed(0)
    module = network().eval()
    with torch.no_grad():
        for values in module.parameters():
            values.add_(0.1 * torch.randn_like(values))
        for name, values in module.named_buffers():
            if values.dim():
                values.copy_(torch.rand(values.shape) + 0.5 if name.endswith("var") else torch.randn(values.shape))
    return module


def forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a network gives for pictures."""
    found = module(inputs["pixel_values"])
    assert isinstance(found, Tensor)
    return found


def pictures(count: int = 2) -> dict[str, Tensor]:
    """Return random pictures of 8 x 8."""
    return {"pixel_values": torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(1))}
