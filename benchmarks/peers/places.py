"""What every script that solves single layers does around its own tool's solvers: layers in, weights out.

    python benchmarks/peers/solve_NAME.py --places FILE.safetensors --out FILE.safetensors --threads N

A place is one input with the layers that read it. The file holds for each place P, layer L and grid G (of GRIDS)

    P/second [I, I]     P/mean_abs [I]     L/weight [O, I]     L/G/scale, L/G/zero [O, groups]

all in float32, and says in its metadata which layers read which place. What a script writes are weights `SOLVER/L`
[O, I], again in float32, with the seconds of each solver and the versions in the metadata. Needs torch and safetensors.

Shape suffixes: O rows, I inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GRIDS: Mapping[str, Mapping[str, Any]] = {
    "int4-g64": {"bits": 4, "symmetric": False, "group_size": 64},
    "int4-channel": {"bits": 4, "symmetric": True, "group_size": None},
}
DAMPING = 0.01  # of the mean second moment, added to the diagonal by every solver
BLOCK = 128  # channels between two lazy updates
EXPONENTS = 20  # tried by AWQ, 0 and 1 among them


@dataclass(frozen=True)
class Place:
    """Hold an input's moments over calibration tokens, and its readers: weights, and (scale, zero) of each grid."""

    name: str
    second_II: Tensor
    mean_abs_I: Tensor
    weights: Mapping[str, Tensor]
    grids: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]  # by grid, then by layer

    def inputs(self) -> Tensor:
        """Return inputs [I, I] with these very second moments, for solvers that want to see inputs."""
        values, vectors = torch.linalg.eigh(self.second_II.double())
        root_II = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.t()
        return (root_II * len(root_II) ** 0.5).float()


Solve = Callable[[Place], dict[str, Tensor]]


def write_places(path: Path, places: Sequence[Place]) -> None:
    """Write the file that the scripts read."""
    tensors: dict[str, Tensor] = {}
    for place in places:
        tensors |= {f"{place.name}/second": place.second_II, f"{place.name}/mean_abs": place.mean_abs_I}
        tensors |= {f"{layer}/weight": weight for layer, weight in place.weights.items()}
        for grid, by_layer in place.grids.items():
            for layer, (scale, zero) in by_layer.items():
                tensors |= {f"{layer}/{grid}/scale": scale, f"{layer}/{grid}/zero": zero}
    readers = json.dumps({place.name: list(place.weights) for place in places})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"readers": readers})


def read_places(path: Path) -> list[Place]:
    """Read the file that `write_places` wrote."""
    with safe_open(path, framework="pt") as file:
        get = file.get_tensor
        return [
            Place(
                name=name,
                second_II=get(f"{name}/second"),
                mean_abs_I=get(f"{name}/mean_abs"),
                weights={layer: get(f"{layer}/weight") for layer in layers},
                grids={
                    grid: {layer: (get(f"{layer}/{grid}/scale"), get(f"{layer}/{grid}/zero")) for layer in layers}
                    for grid in GRIDS
                },
            )
            for name, layers in json.loads(file.metadata()["readers"]).items()
        ]


def run(solvers: Mapping[str, Solve], packages: Sequence[str]) -> int:
    """Carry out the command line with one tool's solvers; return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    places = read_places(arguments.places)
    found: dict[str, Tensor] = {}
    seconds = {}
    for name, solve in solvers.items():
        began = time.monotonic()
        with torch.no_grad():
            made = [solve(place) for place in places]
        seconds[name] = time.monotonic() - began
        for by_layer in made:
            found |= {f"{name}/{layer}": weight.float().contiguous() for layer, weight in by_layer.items()}
    versions = {package: version(package) for package in ("torch", *packages)}
    save_file(found, arguments.out, metadata={"seconds": json.dumps(seconds), "versions": json.dumps(versions)})
    return 0
