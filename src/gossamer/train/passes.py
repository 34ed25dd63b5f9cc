"""How the passes of a training are computed: products in FP8, blocks passed again on the way back, blocks compiled.

    FP8             linear layers of blocks multiply in E4M3 (gradients in E5M2), each tensor with a scale of its own,
                    by torchao; weights, sums and all else stay as they are (Micikevicius et al., "FP8 Formats for Deep
                    Learning", 2022)
    checkpointing   a block keeps its inputs alone, and is passed again when its gradients are wanted (Chen et al.,
                    "Training Deep Nets with Sublinear Memory Cost", 2016): a third more work, a fraction of the memory
    compiled        blocks are compiled one by one, by torch.compile

Heads, embeddings and stems are in no block: they compute as ever. When a training is over its networks are as they
were, but for their values.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer.errors import TechniqueError
from gossamer.models.blocks import find_stacks
from gossamer.train.lesson import Lesson, Plan

FP8_FROM = (8, 9)  # compute capability of the first GPUs that multiply it
FP8_MULTIPLE = 16  # of both sizes of a layer, or its products cannot be taken in FP8
EMULATED = False  # FP8 by rounding and multiplying in float32: slow, for tests


def check_passes(network: nn.Module, plan: Plan, label: str) -> None:
    """Raise TechniqueError where a plan asks for what cannot be: for want of hardware, torchao, a compiler, blocks."""
    asked = {"precision: fp8": plan.precision == "fp8", "checkpointing": plan.checkpointing, "compiled": plan.compiled}
    of_blocks = [setting for setting, is_set in asked.items() if is_set]
    if of_blocks and not blocks_in(network):
        raise TechniqueError(
            f"{label}: {' and '.join(of_blocks)} is a matter of blocks, and this model has no row of blocks alike",
            "leave it out",
        )
    if plan.precision == "fp8" and not EMULATED:
        on_gpu = plan.device.type == "cuda"
        found = torch.cuda.get_device_capability(plan.device) if on_gpu else None
        if found is None or found < FP8_FROM:
            here = f"its compute capability is {found[0]}.{found[1]}" if found else "here is no GPU"
            raise TechniqueError(
                f"{label}: precision: fp8 needs a GPU of compute capability {FP8_FROM[0]}.{FP8_FROM[1]} (H100, L40, "
                f"RTX 4090 or later): {here}",
                "set precision to bf16",
            )
    if plan.precision == "fp8" or plan.optimizer == "adamw_8bit":
        what = "precision: fp8" if plan.precision == "fp8" else "optimizer: adamw_8bit"
        try:
            version("torchao")
        except PackageNotFoundError as error:
            raise TechniqueError(
                f"{label}: {what} needs torchao, which is not installed", "pip install 'gossamer[torchao]'"
            ) from error
    if plan.compiled and plan.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise TechniqueError(
            f"{label}: compiled: true needs a C++ compiler on CPUs, and none was found",
            "install g++, or leave compiled out",
        )


def blocks_in(network: nn.Module | None) -> list[nn.Module]:
    """Return the blocks of all stacks of a network."""
    return [network.get_submodule(name) for name in find_stacks(network)[1]] if network is not None else []


@contextmanager
def passing(lesson: Lesson, plan: Plan) -> Iterator[None]:
    """Have the networks of a lesson compute as a plan says while the `with` lasts."""
    with ExitStack() as stack:
        if plan.precision == "fp8":
            stack.enter_context(in_fp8(lesson.student))
        blocks = blocks_in(lesson.student)
        if plan.compiled:
            stack.enter_context(compiled([*blocks, *blocks_in(lesson.teacher)]))
        if plan.checkpointing:
            stack.enter_context(passed_again(blocks))
        yield


@contextmanager
def in_fp8(network: nn.Module) -> Iterator[None]:
    """Multiply in FP8 in the linear layers of a network's blocks while the `with` lasts; their parameters stay theirs.

    Only plain layers whose sizes are multiples of 16; rows are padded to it. Layers made of others (masked, with
    adapters, rounded) compute as they did.
    """
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = Float8LinearConfig(pad_inner_dim=True, emulate=EMULATED)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for block in blocks_in(network):
        for parent in block.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and not any(size % FP8_MULTIPLE for size in layer.weight.shape):
                    replaced.append((parent, name, layer))
    try:
        for parent, name, layer in replaced:
            setattr(parent, name, Float8Linear.from_float(layer, config=config))
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


def passed_again(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Keep of each block what goes into it alone while the `with` lasts, where gradients are wanted."""
    return _called(blocks, lambda forward: partial(checkpoint, forward, use_reentrant=False))


@contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compile blocks while the `with` lasts: each when it is called first, and again for other shapes."""
    with _called(blocks, torch.compile):
        try:
            yield
        finally:
            torch.compiler.reset()  # what looked inside of a block is in what was compiled


@contextmanager
def _called(blocks: Sequence[nn.Module], wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Have something around the forward of each block while the `with` lasts; hooks of the block lie around that."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.__dict__["forward"] = wrap(block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = own
