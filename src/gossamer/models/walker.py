"""Find how a model calls each of its blocks, without knowing the model.

How a block is called (masks, positions, a shared position bias, the encoder's output) is the model's own business and
differs between architectures. Instead of imitating it, the model's own forward is run with stand-ins: every block in
front of the wanted one answers at once with the outputs recorded last, and the wanted one reports its call and ends
the run. What a loop carries from block to block it takes from the outputs of the block before, so the call is the real
one. The cost is the stem's, and no architecture is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.errors import TechniqueError
from gossamer.models.roles import Stack
from gossamer.models.spilled import tensors_changed

Forward = Callable[[nn.Module, dict[str, Tensor]], Any]
Output = Tensor | tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """Hold what a block was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, device: torch.device) -> Call:
        """Return the call with its tensors on a device; itself for the CPU, where calls are found."""
        if device.type == "cpu":
            return self
        return Call(*tensors_changed((self.args, self.kwargs), lambda values: values.to(device, non_blocking=True)))

    def __call__(self, block: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Output:
        """Call a block with it, with other values for some of the block's parameters when given.

        Caches of keys and values are left out, so that a call can be repeated.
        """
        args = tuple(None if _is_cache(value) else value for value in self.args)
        kwargs = {
            name: None if name.startswith("past_key_value") or _is_cache(value) else value
            for name, value in self.kwargs.items()
        }
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if weights is None:
            return cast("Output", block(*args, **kwargs))
        return cast("Output", functional_call(block, dict(weights), args, kwargs))


def _is_cache(value: Any) -> bool:
    """Say whether a call's argument gathers keys and values from call to call (GPT-2 hands it on by position)."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


class _Reached(Exception):  # not an error: it carries the call out of the model's forward
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class _StandIn(nn.Module):
    """Stand in a block's place; whatever a loop asks of the block besides calling it, the block itself answers."""

    def __init__(self, block: nn.Module, act: Callable[[Call], Output]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule: the block's parameters must not appear twice
        self.__dict__["_act"] = act

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """Answer without computing."""
        return cast("Output", self.__dict__["_act"](Call(args, kwargs)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


@contextmanager
def _standing_in(stack: nn.Module, acts: Mapping[str, Callable[[Call], Output]]) -> Iterator[None]:
    """Put stand-ins in the place of some blocks while the `with` lasts."""
    blocks = dict(stack.named_children())
    try:
        for key, act in acts.items():
            stack.register_module(key, _StandIn(blocks[key], act))
        yield
    finally:
        for key in acts:
            stack.register_module(key, blocks[key])


@dataclass
class Stream:
    """Hold the outputs of the block passed last, one a sample, and those of the last block of each finished stack."""

    outputs: Sequence[Output] = field(default_factory=list)
    finished: dict[str, Sequence[Output]] = field(default_factory=dict)

    def finish(self, stack: str) -> None:
        """Note that the last block of a stack was passed."""
        self.finished[stack], self.outputs = self.outputs, []


class Walker:
    """Run a model's own forward with stand-ins, to find how its blocks are called."""

    def __init__(self, module: nn.Module, forward: Forward, samples: Sequence[dict[str, Tensor]]) -> None:
        self.module = module
        self.forward = forward
        self.samples = samples

    def calls(self, stack: Stack, index: int, stream: Stream, count: int | None = None) -> Iterator[Call]:
        """Yield what block `index` of a stack is called with, for the first `count` samples (default: all)."""
        container = self.module.get_submodule(stack.name)
        keys = block_keys(container)

        def reach(call: Call) -> Output:
            raise _Reached(call)

        for position, sample in enumerate(self.samples[:count]):
            with ExitStack() as entered:
                self._replay_finished(entered, stream, position)
                acts: dict[str, Callable[[Call], Output]] = {keys[index]: reach}
                if index:
                    acts |= dict.fromkeys(keys[:index], _answering(stream.outputs[position]))
                entered.enter_context(_standing_in(container, acts))
                try:
                    self.forward(self.module, sample)
                except _Reached as reached:
                    yield reached.call
                    continue
            raise TechniqueError(
                f"{stack.name}.{keys[index]} is not called by the model's forward", "name it in `ignore`"
            )

    def replay(self, stream: Stream, position: int) -> Any:
        """Return a sample's output with all finished stacks answering from the stream: only the rest computes."""
        with ExitStack() as entered:
            self._replay_finished(entered, stream, position)
            return self.forward(self.module, self.samples[position])

    def outputs(
        self, stacks: Sequence[Stack], held: Callable[[nn.Module], AbstractContextManager[None]]
    ) -> Iterator[Any]:
        """Yield each sample's output; all samples pass a block, which `held` keeps in memory, before the next one."""
        stream = Stream()
        for stack in stacks:
            container = self.module.get_submodule(stack.name)
            for index, key in enumerate(block_keys(container)):
                block = container.get_submodule(key)
                calls = list(self.calls(stack, index, stream))
                with held(block):
                    stream.outputs = [call(block) for call in calls]
            stream.finish(stack.name)
        for position in range(len(self.samples)):
            yield self.replay(stream, position)

    def _replay_finished(self, entered: ExitStack, stream: Stream, position: int) -> None:
        for name, outputs in stream.finished.items():
            container = self.module.get_submodule(name)
            acts = dict.fromkeys(block_keys(container), _answering(outputs[position]))
            entered.enter_context(_standing_in(container, acts))


def _answering(output: Output) -> Callable[[Call], Output]:
    """Return what stands in for a block by giving a recorded output."""
    return lambda _: output


def block_keys(container: nn.Module) -> list[str]:
    """Return the names of a list's members that own parameters, in order."""
    return [key for key, child in container.named_children() if next(child.parameters(), None) is not None]


def hidden_states(output: Output) -> Tensor:
    """Return the hidden states of a block's output: itself, or the first of several."""
    values = output if isinstance(output, Tensor) else output[0]
    assert isinstance(values, Tensor)
    return values
