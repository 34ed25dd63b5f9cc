"""Weights that are split between processes while they are trained (FSDP2, by Accelerate).

Every process holds its part of the student's weights, of their gradients and of Adam's two moments; a block is whole
only while it is passed (Rajbhandari et al., "ZeRO", 2020, section 5; Zhao et al., "PyTorch FSDP", 2023). What is split
is a copy of the student, whose values are put together at the end; the original is whole in each process.

Checkpoints are whole, put together in main memory by process 0, and split anew for the processes that go on. Those in
parts (torch.distributed.checkpoint) would be written faster, and are read through pickle. Accelerate splits between
GPUs; what it does is the same on CPUs, where it is asked to do it here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import FSDP_MODEL_NAME

from gossamer.errors import TechniqueError
from gossamer.models.blocks import find_stacks
from gossamer.train.lesson import Lesson
from gossamer.train.weights import nonzeros

VARIABLES = ("ACCELERATE_", "FSDP_")  # of the environment, that Accelerate sets for good where it splits once


@dataclass(frozen=True)
class Splitting:
    """Hold a lesson whose student is a copy, to be split, and the student that it was copied from."""

    lesson: Lesson
    whole: nn.Module

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what TrainingArguments are told: split, block by block."""
        student = self.lesson.student
        classes = sorted({type(student.get_submodule(name)).__name__ for name in find_stacks(student)[1]})
        config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
        return {"fsdp": True, "fsdp_config": {**config, "transformer_layer_cls_to_wrap": classes}}

    def put_together(self, trained: nn.Module) -> None:
        """Give the whole student the values of its split copy, inside of what was trained; all processes take part.

        Raises RuntimeError where the copy is not split: what was asked for has not been done.
        """
        from torch.distributed.tensor import DTensor

        reshard(trained)
        held = dict(self.whole.named_parameters())
        with torch.no_grad():
            for name, values in self.lesson.student.named_parameters():
                if not isinstance(values, DTensor):
                    raise RuntimeError(f"{name} was not split between processes")
                held[name].copy_(values.full_tensor())


@contextmanager
def split(lesson: Lesson, label: str) -> Iterator[Splitting]:
    """Yield the lesson with a copy of its student, which may be split while the `with` lasts.

    Raises TechniqueError where a step changes weights between the steps.
    """
    if lesson.schedule is not None:
        raise TechniqueError(
            f"{label} looks at whole weights between the steps, and sharding: fsdp splits them", "leave sharding out"
        )
    names = {module: name for name, module in lesson.student.named_modules()}
    student = copy.deepcopy(lesson.student)
    blocks = [student.get_submodule(names[block]) for block in lesson.student_blocks]
    variables = _variables()
    try:
        yield Splitting(replace(lesson, student=student, student_blocks=blocks), lesson.student)
    finally:
        for name in set(_variables()) - set(variables):
            del os.environ[name]
        os.environ.update(variables)


def check_same_way(checkpoint: Path, *, split: bool, label: str) -> None:
    """Raise TechniqueError where a checkpoint of split weights is to be gone on from by one process, or the reverse.

    Between numbers of processes from two up weights are split anew by themselves.
    """
    was_split = any(checkpoint.glob(f"{FSDP_MODEL_NAME}*"))
    if was_split != split:
        wrote, now = ("several processes", "one") if was_split else ("one process", "several")
        raise TechniqueError(
            f"{label} was begun with sharding: fsdp by {wrote}, and is to go on in {now}: {checkpoint}",
            f"start {wrote} again, or remove that folder's parent to begin the training anew",
        )


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


def reshard(network: nn.Module) -> None:
    """Have each process hold its part of every weight again: some are left whole behind a pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def allow(accelerator: Any, plugin_arguments: Mapping[str, Any]) -> None:
    """Have an Accelerator split on CPUs too, and compute as one process does: autocast says what is rounded."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what it is set to whenever asked for
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


class ZerosStay(TrainerCallback):
    """Keep zeros of sparse weights as training begins: parts of gradients are put together past any hook."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.stays: list[tuple[str, Tensor]] = []

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        for name, values in self.network.named_parameters():
            if values.requires_grad and values.ndim > 1:
                yield name, getattr(values, "_local_tensor", values)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note which are."""
        found = ((name, nonzeros(part)) for name, part in self._parts())
        self.stays = [(name, stays) for name, stays in found if stays is not None]

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set them back."""
        parts = dict(self._parts()) if self.stays else {}
        with torch.no_grad():
            for name, stays in self.stays:
                parts[name].mul_(stays)
