"""The sweep: calls are the model's own, outputs chained through blocks are the model's outputs, kills lose nothing."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.example import made_up_example
from gossamer.models.quantized import QuantSpec
from gossamer.models.roles import ModelMap, Stack
from gossamer.models.source import Source
from gossamer.models.spilled import Lazy
from gossamer.models.structure import map_model
from gossamer.models.walker import Output, Stream, Walker, block_keys, hidden_states
from gossamer.run.progress import Silent
from gossamer.run.team import ALONE
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block, observe, token_error
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.layers import weight_decisions
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.scaled import Awq, Smooth
from gossamer.techniques.sweep_memory import SweepMemory
from gossamer.techniques.sweep_shared import share_of

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "models" / "test_structure.py"))["FAMILIES"]
SPEAK = get_task("causal-lm")


def run_model(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = module(**inputs).logits
    assert isinstance(found, Tensor)
    return found


def varied(example: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return samples that differ: token ids turned round, real values with noise on them."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for shift in range(count):
        changed = {}
        for name, values in example.items():
            real = values.is_floating_point()
            changed[name] = values + torch.randn(values.shape, generator=draw) if real else values.roll(shift, -1)
        samples.append(changed)
    return samples


@pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.__name__)
def test_blocks_called_one_after_another_are_the_model(family: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = family().eval()
    example = made_up_example(network)
    assert example is not None
    model = map_model(network, example, run_model)
    samples = varied(example, 3)
    walker, stream = Walker(network, run_model, samples), Stream()
    with torch.no_grad():
        wanted = [run_model(network, sample) for sample in samples]
        for stack in model.stacks:
            container = network.get_submodule(stack.name)
            keys = block_keys(container)
            assert len(keys) == stack.num_blocks
            for index, key in enumerate(keys):
                block = container.get_submodule(key)
                stream.outputs = [call(block) for call in walker.calls(stack, index, stream)]
            stream.finished[stack.name], stream.outputs = stream.outputs, []
        # the whole model, every block answered from the stream
        found: list[Tensor] = []
        walker.forward = lambda module, inputs: found.append(run_model(module, inputs))
        for position in range(len(samples)):
            walker.replay(stream, position)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert all(type(part).__name__ != "_StandIn" for part in network.modules())  # every block is back in its place


def test_moments_are_sums_over_tokens_and_shared_by_readers_of_one_tensor() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.other, self.conv = (
                nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 2), nn.Conv2d(2, 3, 3, padding=1, stride=2),
            )  # fmt: skip

        def forward(self, x: Tensor, picture: Tensor) -> None:
            self.q(x), self.k(x), self.other(x * 2), self.conv(picture)

    torch.manual_seed(0)
    reads = Reads()
    passes = [(torch.randn(2, 5, 4), torch.randn(1, 2, 6, 6)) for _ in range(3)]
    found = observe(dict(reads.named_children()), (partial(reads, *inputs) for inputs in passes))
    assert found["q"] is found["k"]
    assert found["other"] is not found["q"]
    rows = np.concatenate([x.reshape(-1, 4).numpy() for x, _ in passes]).astype(np.float64)
    assert found["q"].num_tokens == len(rows) == 30
    np.testing.assert_allclose(found["q"].second_II, rows.T @ rows / 30, rtol=1e-5)
    np.testing.assert_allclose(found["other"].second_II, 4 * (rows.T @ rows) / 30, rtol=1e-5)
    np.testing.assert_allclose(found["q"].mean_abs_I, np.abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["q"].max_abs_I, np.abs(rows).max(0))
    # a convolution's output error is described by the moments of its patches
    change = torch.randn(3, 2, 3, 3)
    outputs = [nn.functional.conv2d(picture, change, padding=1, stride=2) for _, picture in passes]
    wanted = sum(float(y.square().sum()) for y in outputs) / found["conv"].num_tokens
    flat = change.flatten(1)
    assert float((flat @ found["conv"].second_II * flat).sum()) == pytest.approx(wanted, rel=1e-5)


def test_a_pass_ends_where_all_was_seen_unless_layers_are_called_now_and_then() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.ended = nn.Linear(2, 2), nn.Linear(2, 2), 0

        def forward(self, x: Tensor, times: int) -> None:
            for _ in range(times):
                x = self.second(self.first(x))
            self.ended += 1

    for times, ended in (([1, 1, 1], 1), ([2, 1, 1], 3), ([0, 1, 2], 3)):
        chain = Chain()
        layers = {"first": chain.first, "second": chain.second}
        found = observe(layers, (partial(chain, torch.ones(1, 2), count) for count in times))
        assert chain.ended == ended
        assert [found[name].num_tokens for name in layers] == [sum(times)] * 2


def test_each_token_counts_by_its_own_size() -> None:
    wanted = torch.tensor([[[1.0, 1.0], [1000.0, 1000.0]]])
    assert token_error(wanted, wanted) == 0
    assert float(token_error(wanted * 1.1, wanted)) == pytest.approx(0.01)
    assert float(token_error(wanted + torch.tensor([[[1.0], [0.0]]]), wanted)) == pytest.approx(0.5)
    picture = torch.ones(1, 3, 4, 4)
    assert float(token_error(picture * 1.5, picture)) == pytest.approx(0.25)


class Rounded(BlockTechnique):
    """Plain rounding as a sweep, to compare with plain rounding at once; may be told to spoil or to stop."""

    name: ClassVar[str] = "rounded"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs()
    solved: ClassVar[list[str]] = []

    bits: int = 4
    stop_before: str = ""
    spoil: str = ""

    def resolve(self, model: ModelMap) -> list[Decision]:
        return weight_decisions(model, self.name, QuantSpec(bits=self.bits), targets=("linear",), ignore=())

    def solve(self, block: Block) -> None:
        if block.name == self.stop_before:
            raise KeyboardInterrupt
        self.solved.append(block.name)
        for parameter, decision in block.decisions.items():
            assert decision.weight is not None
            weight = block.weight(parameter) * (float("nan") if block.name == self.spoil else 1.0)
            if block.name == self.spoil:
                block.candidate.module.get_parameter(parameter).copy_(weight)
            else:
                block.set_quantized(parameter, quantize_weight(weight, decision.weight, scale="mse"))

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Rounded, ...]]:
        yield from ()


def opened(run: Run | None = None) -> tuple[Candidate, ModelMap, Context]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    draw = np.random.default_rng(0)
    batches = [Batch({"input_ids": draw.integers(1, 64, (1, 12))}, np.array([index])) for index in range(8)]
    source = Source.open(LlamaForCausalLM(config).eval(), forward=run_model)
    candidate = Candidate(source=source, module=source.module(SPEAK))
    example = {"input_ids": torch.from_numpy(batches[0].inputs["input_ids"])}
    context = Context(
        task=SPEAK, example=batches[0].inputs, calibration=batches, progress=Silent(), run=run, identity={"of": "test"}
    )
    return candidate, map_model(candidate.module, example, source.forward), context


def codes_of(candidate: Candidate) -> dict[str, Any]:
    return {name: (codes.codes, codes.scale) for name, codes in sorted(candidate.quantized.items())}


def same(a: Candidate, b: Candidate) -> bool:
    ours, theirs = codes_of(a), codes_of(b)
    return ours.keys() == theirs.keys() and all(
        torch.equal(x, y) for name in ours for x, y in zip(ours[name], theirs[name], strict=True)
    )


def test_a_sweep_with_plain_rounding_is_plain_rounding_head_included() -> None:
    candidate, model, context = opened()
    Rounded().apply(candidate, model, context)
    plain, model, context = opened()
    Quantize(bits=4).apply(plain, model, context)
    assert "lm_head.weight" in candidate.quantized
    assert same(candidate, plain)


def test_a_block_that_a_solver_spoils_is_rounded_plainly() -> None:
    candidate, model, context = opened()
    Rounded(spoil="model.layers.2").apply(candidate, model, context)
    plain, model, context = opened()
    Quantize(bits=4).apply(plain, model, context)
    assert same(candidate, plain)


def test_an_interrupted_sweep_goes_on_where_it_stopped_and_ends_with_the_same_codes(tmp_path: Path) -> None:
    identity = {"verb": "test"}
    Rounded.solved.clear()
    with Run(tmp_path / "run", identity) as run:
        candidate, model, context = opened(run)
        with pytest.raises(KeyboardInterrupt):
            Rounded(stop_before="model.layers.2").apply(candidate, model, context)
    assert Rounded.solved == ["model.layers.0", "model.layers.1"]
    Rounded.solved.clear()

    class Going(Rounded):  # the same settings in the eyes of the run, without the interruption
        def entry(self) -> dict[str, Any]:
            return Rounded(stop_before="model.layers.2").entry()

    with Run(tmp_path / "run", identity) as run:
        candidate, model, context = opened(run)
        Going().apply(candidate, model, context)
    assert Rounded.solved == ["model.layers.2", "model.layers.3", "layers outside of blocks"]
    straight, model, context = opened()
    Rounded().apply(straight, model, context)
    assert same(candidate, straight)
    # the streams are gone, the codes are kept: a third run solves nothing and passes nothing
    assert not list((tmp_path / "run" / "steps").glob("stream-*"))
    Rounded.solved.clear()
    with Run(tmp_path / "run", identity) as run:
        candidate, model, context = opened(run)
        Going().apply(candidate, model, context)
    assert Rounded.solved == []
    assert same(candidate, straight)


@pytest.mark.parametrize("spilled", [False, True])
def test_streams_are_kept_verbatim(tmp_path: Path, spilled: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    one, two, three = (torch.randn(1, 3, 2, generator=draw) for _ in range(3))
    outputs: list[Output] = [one, (two, None, three.bfloat16()), three[:, 1:]]
    share = share_of(len(outputs), ALONE)
    encoder, decoder = Stack("encoder", 1, 1, "Layer"), Stack("decoder", 2, 1, "Layer")
    places = [(encoder, 0), (decoder, 0), (decoder, 1)]
    with Run(tmp_path, {"verb": "test"}) as run:
        memory = SweepMemory(run, {"of": "test"})

        def pass_on(number: int, of: str, outputs: list[Output]) -> Sequence[Output]:
            return memory.passed(places, number, of, iter(outputs), share=share, spilled=spilled)

        for number in range(3):
            pass_on(number, "reference", outputs[:2])
            found = pass_on(number, "live", outputs[number:] + outputs[:number])
            assert isinstance(found, Lazy) == spilled
            memory.forget_streams(places, number - 1)
        # those behind the last block of a stack, and the last
        assert len(list((tmp_path / "steps").glob("stream-*"))) == 4
        assert len(pass_on(2, "live", [])) == 3  # what is there is not computed again
        live, reference = Stream(), Stream()
        assert memory.load_streams(places, live, reference, share) == 3
        assert same_outputs(live.finished["encoder"], outputs)
        assert same_outputs(live.finished["decoder"], outputs[2:] + outputs[:2])
        assert same_outputs(reference.finished["encoder"], outputs[:2])
        memory.forget_streams(places)
        assert not list((tmp_path / "steps").glob("stream-*"))
        assert memory.load_streams(places, Stream(), Stream(), share) == 0


def same_outputs(found: Sequence[Output], wanted: Sequence[Output]) -> bool:
    def same_output(ours: Output, theirs: Output) -> bool:
        if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
            both = isinstance(ours, Tensor) and isinstance(theirs, Tensor)
            return both and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return len(ours) == len(theirs) and all(
            a is b if a is None or b is None else same_output(a, b) for a, b in zip(ours, theirs, strict=True)
        )

    return len(found) == len(wanted) and all(same_output(a, b) for a, b in zip(found, wanted, strict=True))


def test_too_few_samples_are_told(tmp_path: Path) -> None:
    class Hungry(Rounded):
        def rows_needed(self) -> int:
            return 9

    candidate, model, context = opened()
    with pytest.raises(TechniqueError, match="needs 9 calibration samples, 8 were given"):
        Hungry().apply(candidate, model, context)


def test_the_hidden_states_are_the_first_of_several_outputs() -> None:
    values = torch.ones(1, 2, 3)
    assert hidden_states(values) is values
    assert hidden_states((values, None)) is values


def on_disk(folder: Path, run: Run | None = None, *, streamed: bool) -> tuple[Candidate, ModelMap, Context]:
    """Return the same as `opened` from a folder; streamed: read piece by piece."""
    whole, model, context = opened(run)
    if not (folder / "config.json").exists():
        whole.module.save_pretrained(folder)  # type: ignore[operator]
    source = Source.open(folder)
    if not streamed:
        return Candidate(source=source, module=source.module(SPEAK)), model, context
    assert source.shards is not None
    return Candidate.streamed(source, source.skeleton(SPEAK), source.shards.read, budget=0), model, context


STEPS = [Gptq(bits=4, group_size=16), Quantize(targets=("embedding",)), Cast(dtype="bf16")]
FLOATS = [Gptq(format="nvfp4"), Quantize(format="fp8", targets=("embedding",)), Cast(dtype="bf16")]
SCALED = [Smooth(), Awq(bits=3, group_size=16), Cast(dtype="bf16")]


def carried_out(
    candidate: Candidate, model: ModelMap, context: Context, steps: Sequence[Technique] = STEPS
) -> Candidate:
    for step in steps:
        candidate = step.apply(candidate, model, context)
    return candidate


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("steps", [STEPS, FLOATS, SCALED], ids=["gptq", "nvfp4", "awq"])
def test_a_model_that_is_read_piece_by_piece_gets_the_same_codes(
    tmp_path: Path, steps: Sequence[Technique], remembered: bool
) -> None:
    whole = carried_out(*on_disk(tmp_path / "model", streamed=False), steps)
    if remembered:
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            streamed = carried_out(*on_disk(tmp_path / "model", run, streamed=True), steps)
            assert same(streamed, whole)
        sweeps = sum(isinstance(step, BlockTechnique) for step in steps)
        folders = list((tmp_path / "run" / "steps").glob("block-*"))
        assert len(folders) == 4 * sweeps + 1  # four blocks each, and the head
    else:
        streamed = carried_out(*on_disk(tmp_path / "model", streamed=True), steps)
        assert same(streamed, whole)
    assert streamed.weights is not None
    assert streamed.weights.loaded_bytes == 0
    for name, values in whole.module.named_parameters():
        assert torch.equal(streamed.values(name).float(), values)
        if name in whole.quantized:
            assert streamed.outline(name) == whole.outline(name)


def test_a_sweep_over_pieces_goes_on_where_it_stopped(tmp_path: Path) -> None:
    identity = {"verb": "test"}
    with Run(tmp_path / "run", identity) as run:
        candidate, model, context = on_disk(tmp_path / "model", run, streamed=True)
        with pytest.raises(KeyboardInterrupt):
            Rounded(stop_before="model.layers.2").apply(candidate, model, context)
    Rounded.solved.clear()

    class Going(Rounded):
        def entry(self) -> dict[str, Any]:
            return Rounded(stop_before="model.layers.2").entry()

    with Run(tmp_path / "run", identity) as run:
        candidate, model, context = on_disk(tmp_path / "model", run, streamed=True)
        Going().apply(candidate, model, context)
        assert Rounded.solved == ["model.layers.2", "model.layers.3", "layers outside of blocks"]
        straight, model, context = opened()
        Rounded().apply(straight, model, context)
        assert same(candidate, straight)
