"""A sweep on a GPU: nothing is left behind in main memory, results are the CPU's, and memory there follows the block.

The GPU is a pretended one (`pretended_gpu.py`), and a real one too where there is one.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gossamer.errors import TechniqueError
from gossamer.models.caches import CacheSpec
from gossamer.models.candidate import Candidate
from gossamer.models.moved import moved
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.walker import Call
from gossamer.recipe import Recipe
from gossamer.run.workspace import Run
from gossamer.techniques import sweep_device, sweep_precision
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.prune.sparsegpt import sparsegpt
from gossamer.techniques.prune.sparsify import Sparsify
from gossamer.techniques.prune.units import made_up_for, obs_order
from gossamer.techniques.quantize.awq import Reader, awq_factors, round_clipped
from gossamer.techniques.quantize.calibrated import Gptq, LearnedRounding
from gossamer.techniques.quantize.descend import descend, descend_values
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.inverse_factor import by_lapack, by_torch, inverse_factor
from gossamer.techniques.quantize.learned import learn_rounding
from gossamer.techniques.quantize.low_rank import low_rank
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.quantize.refit import refit_scales
from gossamer.techniques.quantize.scaled import Awq, Smooth
from gossamer.techniques.quantize.smooth import smooth_factors
from gossamer.techniques.registry import resolve
from gossamer.techniques.sweep_device import device_bytes, memory_errors

pytestmark = pytest.mark.timeout(400)  # each operation goes through Python, and the machine may be busy

HERE = Path(__file__).parent
TINY = runpy.run_path(str(HERE / "tiny_candidates.py"))
PRETENDED = runpy.run_path(str(HERE / "pretended_gpu.py"))
opened: Callable[..., Any] = TINY["opened"]
Told: Callable[[], Any] = TINY["Told"]
pretended, GPU = PRETENDED["pretended"], PRETENDED["GPU"]
Placed = Callable[[], AbstractContextManager[torch.device]]
GRID: dict[str, Any] = {"bits": 3, "group_size": 16, "passes": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let samples pass in float32 on this processor too, whatever it multiplies: the two are compared closely."""
    monkeypatch.setattr(sweep_precision, "multiplies_bf16", lambda: False)


@contextmanager
def pretending() -> Iterator[torch.device]:
    """Yield the pretended GPU while the `with` lasts, in which something must be computed."""
    with pretended() as there:
        yield GPU
    assert there.called, "nothing was computed there"


@pytest.fixture(params=["pretended", "real"])
def placed(request: pytest.FixtureRequest) -> Placed:
    """Return what gives a GPU for the length of a `with`: the pretended one, and a real one where there is one."""
    if request.param == "pretended":
        return pretending
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return lambda: nullcontext(GPU)


@pytest.fixture
def gpu(placed: Placed) -> Iterator[torch.device]:
    """Yield a GPU for the length of a test."""
    with placed() as device:
        yield device


# ---------------------------------------------------------------- solvers


def layer(rows: int = 24, inputs: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """Return a weight and the second moments of inputs that hang together."""
    draw = torch.Generator().manual_seed(0)
    x_tI = torch.randn(tokens, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    return torch.randn(rows, inputs, generator=draw), x_tI.t() @ x_tI / tokens


def in_order(second_II: Tensor, damping: float) -> Tensor:
    return second_II.double() + damping * float(second_II.diagonal().mean()) * torch.eye(len(second_II)).double()


@pytest.mark.parametrize("damping", [1.0, 0.01, 1e-6])
@pytest.mark.parametrize("tokens", [256, 40])
def test_both_ways_lead_to_one_factor(damping: float, tokens: int) -> None:
    _, second_II = layer(tokens=tokens)  # of 40 tokens the moments alone are singular
    damped_II = in_order(second_II, damping)
    ours, theirs = by_torch(damped_II.clone()), by_lapack(damped_II.clone())
    assert ours is not None
    assert theirs is not None
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    assert bool((ours.tril(-1) == 0).all())
    assert bool((ours.diagonal() > 0).all())
    identity_II = ours.double() @ damped_II @ ours.double().t()  # U S U^T = 1, whatever way led to U
    torch.testing.assert_close(identity_II, torch.eye(64).double(), rtol=1e-3, atol=1e-3)


def test_neither_way_factors_what_is_not_positive() -> None:
    _, second_II = layer()
    second_II.diagonal().sub_(2 * second_II.diagonal().max())
    assert by_torch(second_II.double()) is None
    assert by_lapack(second_II.double()) is None


SPECS = [
    QuantSpec(bits=4, group_size=16),
    QuantSpec(bits=3, symmetric=False, group_size=16),
    QuantSpec(bits=4),
    QuantSpec(bits=8, format="fp8"),
    QuantSpec(bits=4, group_size=32, format="mxfp4"),
    QuantSpec(bits=4, group_size=16, format="nvfp4"),
    QuantSpec(bits=4, group_size=16, format="nf4"),
]


def same_codes(found: Quantized, wanted: Quantized, share: float = 0.98) -> None:
    """Check that codes are the CPU's: but for a few on a border between two, and those that answer to them."""
    back = found.to(torch.device("cpu"))
    assert float((back.codes == wanted.codes).double().mean()) >= share
    torch.testing.assert_close(back.scale.float(), wanted.scale.float(), rtol=0.15, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_the_same(gpu: torch.device, spec: QuantSpec) -> None:
    weight_OI, second_II = layer()
    there = weight_OI.to(gpu), second_II.to(gpu)
    for order in ("static", "none"):
        wanted = gptq(weight_OI, second_II, spec, order=order)  # type: ignore[arg-type]
        found = gptq(*there, spec, order=order)  # type: ignore[arg-type]
        assert found.codes.device == gpu
        same_codes(found, wanted)
    same_codes(refit_scales(*there, wanted.to(gpu)), refit_scales(weight_OI, second_II, wanted), 1.0)
    same_codes(descend(*there, wanted.to(gpu)), descend(weight_OI, second_II, wanted))
    for clip in ("weights", "diagonal", "full"):
        wanted = round_clipped(weight_OI, second_II, spec, clip=clip)  # type: ignore[arg-type]
        same_codes(round_clipped(*there, spec, clip=clip), wanted)  # type: ignore[arg-type]
    search = "hqq" if not spec.symmetric else "minmax"
    same_codes(quantize_weight(there[0], spec, scale=search), quantize_weight(weight_OI, spec, scale=search), 0.999)


def test_what_is_taken_out_is_the_same(gpu: torch.device) -> None:
    weight_OI, second_II = layer()
    there = weight_OI.to(gpu), second_II.to(gpu)
    for more in ({"sparsity": 0.5}, {"sparsity": 0.0, "pattern": (2, 4)}):
        wanted, found = sparsegpt(weight_OI, second_II, **more), sparsegpt(*there, **more)  # type: ignore[arg-type]
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)
        fitted = descend_values(weight_OI, second_II, wanted)
        torch.testing.assert_close(descend_values(*there, wanted.to(gpu)).cpu(), fitted, rtol=1e-3, atol=1e-3)
    assert obs_order(*there, 4, 5) == obs_order(weight_OI, second_II, 4, 5)
    stays_I = torch.arange(64) % 3 != 0
    found = made_up_for(*there, stays_I.to(gpu))
    torch.testing.assert_close(found.cpu(), made_up_for(weight_OI, second_II, stays_I), rtol=1e-3, atol=1e-3)
    for found, wanted in zip(low_rank(*there, 4), low_rank(weight_OI, second_II, 4), strict=True):
        torch.testing.assert_close(found.cpu().abs(), wanted.abs(), rtol=1e-3, atol=1e-3)


def test_factors_of_channels_are_the_same(gpu: torch.device) -> None:
    weight_OI, second_II = layer()
    mean_I, spec = second_II.diagonal().sqrt(), QuantSpec(bits=4, group_size=16)
    ours, theirs = Reader(weight_OI.to(gpu), second_II.to(gpu), spec), Reader(weight_OI, second_II, spec)
    for search in (awq_factors, smooth_factors):
        found, wanted = search(mean_I.to(gpu), [ours]), search(mean_I, [theirs])
        assert found.exponent == wanted.exponent
        torch.testing.assert_close(found.factors_I.cpu(), wanted.factors_I, rtol=1e-4, atol=1e-5)


def test_learned_rounding_is_the_same(gpu: torch.device) -> None:
    weight_OI, _ = layer()
    draw = torch.Generator().manual_seed(1)
    samples = [torch.randn(8, 64, generator=draw) for _ in range(4)]
    start = quantize_weight(weight_OI, QuantSpec(bits=3, group_size=16, symmetric=False))
    found = []
    for device in (torch.device("cpu"), gpu):
        inputs, whole = [x.to(device) for x in samples], weight_OI.to(device)
        loss = lambda made, i, x=inputs, w=whole: (x[i] @ (made["w"] - w).t()).square().mean()  # noqa: E731
        codes, _ = learn_rounding(loss, {"w": whole}, {"w": start.to(device)}, 4, steps=6, batch_size=2)
        found.append(codes["w"])
    same_codes(found[1], found[0])
    assert not torch.equal(found[0].codes, start.codes)


def test_moments_gather_where_they_are_told(gpu: torch.device) -> None:
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 5, 160, generator=draw)
    ours, theirs = Moments.empty(160, gpu), Moments.empty(160)
    ours.add(inputs.to(gpu))
    theirs.add(inputs)
    ours.merge(ours)
    theirs.merge(theirs)
    for part in ("second_II", "covariance_II", "mean_abs_I", "max_abs_I"):
        found = getattr(ours, part)
        assert found.device == gpu
        torch.testing.assert_close(found.cpu(), getattr(theirs, part), rtol=1e-4, atol=1e-5)


def test_a_cache_rounds_where_its_keys_are(gpu: torch.device) -> None:
    spec, keys = CacheSpec(format="int8", scope="head"), torch.randn(1, 2, 5, 8)
    scale = spec.scale(keys)
    torch.testing.assert_close(spec.round(keys.to(gpu), scale).cpu(), spec.round(keys, scale))


# ---------------------------------------------------------------- a part of a model, elsewhere for a while


def test_a_module_comes_back_as_it_was(gpu: torch.device) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    before = {name: (id(values), values.clone()) for name, values in network.state_dict(keep_vars=True).items()}
    with moved(network, gpu):
        assert {values.device for values in network.state_dict().values()} == {gpu}
        assert network[2].weight is network[0].weight
        assert isinstance(network[0].weight, nn.Parameter)
        network[0].weight.data.zero_()
    after = network.state_dict(keep_vars=True)
    assert {name: id(values) for name, values in after.items()} == {name: place for name, (place, _) in before.items()}
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())
    with pytest.raises(KeyboardInterrupt), moved(network, gpu):
        raise KeyboardInterrupt
    assert network[0].weight is after["0.weight"]


def test_a_call_goes_with_all_that_it_holds(gpu: torch.device) -> None:
    call = Call((torch.ones(2),), {"mask": None, "positions": (torch.zeros(1), torch.ones(1)), "causal": True})
    there = call.on(gpu)
    assert {values.device for values in (there.args[0], *there.kwargs["positions"])} == {gpu}
    assert there.kwargs["mask"] is None
    assert there.kwargs["causal"] is True
    assert call.on(torch.device("cpu")) is call


# ---------------------------------------------------------------- whole sweeps


def llama(num_layers: int = 2, *, tied: bool = True) -> nn.Module:
    network: nn.Module = TINY["llama"](num_layers, tied=tied)
    return network


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(intermediate_size=48, **SIZES)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_inner=48, bos_token_id=0, eos_token_id=0, **SIZES)).eval()


def mixtral() -> nn.Module:
    network: nn.Module = runpy.run_path(str(HERE.parent / "models" / "tiny_experts.py"))["mixtral"]()
    return network


STEPS: list[tuple[Callable[[], nn.Module], str]] = [
    (llama, "- gptq: {bits: 3, group_size: 16}"),
    (gpt2, "- gptq: {bits: 3, group_size: 16, passes: 0}"),
    (mixtral, "- gptq: {bits: 3, group_size: 16, passes: 0}"),
    (llama, "- awq: {bits: 3, group_size: 16, exponents: 4}"),
    (llama, "- smooth: {}"),
    (bert, "- sparsify: {sparsity: 0.5, by: wanda}"),
    (llama, "- learned_rounding: {bits: 3, group_size: 16, steps: 4, batch_size: 2, start: nearest}"),
    (bert, "- prune: {what: ffn, to: 50%}"),
    (llama, "- quantize: {bits: 3, group_size: 16}\n- compensate: {rank: 4}"),
]
# The same sweeps and solvers in other company: each operation goes through Python, and a sweep has thousands.
ALIKE: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: llama(1, tied=False), "- gptq: {bits: 3, group_size: 16, passes: 0, order: none}"),
    (bert, "- gptq: {bits: 3, group_size: 16, passes: 0}"),
    (llama, "- gptq: {bits: 4, group_size: 16, sparsity: 0.4, passes: 0}"),
    (llama, "- gptq: {format: mxfp4, bits: 4, group_size: 32, symmetric: true, passes: 0}"),
    (gpt2, "- awq: {bits: 3, group_size: 16, exponents: 1, round: gptq}"),  # of finer ones two may be as good
    (llama, '- sparsify: {pattern: "2:4", passes: 0}'),
    (llama, "- gguf: {format: q4_1}"),
    (bert, "- low_rank: {rank: 50%}"),
    (bert, "- quantize: {activations: dynamic}\n- compensate: {rank: 4}"),
]
SWEEPS = [
    pytest.param(family, text, id=f"{family.__name__} {text}", marks=marks)
    for steps, marks in ((STEPS, ()), (ALIKE, (pytest.mark.slow,)))
    for family, text in steps
]


def steps_of(text: str) -> list[Any]:
    return resolve(Recipe.from_yaml(text, "a test"))


def swept(network: nn.Module, text: str, **more: Any) -> Candidate:
    """Return a candidate after a recipe."""
    candidate, model, context = opened(network, 8, **more)
    for step in steps_of(text):
        candidate = step.apply(candidate, model, context)
        model = step.after(model)
    assert isinstance(candidate, Candidate)
    return candidate


def outputs(candidate: Candidate) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 64, (8, 16), generator=draw)
    with torch.no_grad(), candidate.simulated() as module:
        found: Tensor = module(input_ids=tokens).logits
    return found


@pytest.mark.parametrize(("family", "text"), SWEEPS)
def test_a_sweep_ends_as_on_the_cpu(placed: Placed, family: Callable[[], nn.Module], text: str) -> None:
    wanted = swept(family(), text)
    with placed() as gpu:
        found = swept(family(), text, device=gpu)
    # all is back in main memory
    assert all(type(values) is nn.Parameter and values.device.type == "cpu" for values in found.module.parameters())
    assert found.quantized.keys() == wanted.quantized.keys()
    for name, codes in found.quantized.items():
        assert type(codes.codes) is type(codes.scale) is Tensor
        same_codes(codes, wanted.quantized[name], 0.9)
    original = outputs(Candidate(source=wanted.source, module=family()))
    change = float((outputs(wanted) - original).square().mean())
    apart = float((outputs(found) - outputs(wanted)).square().mean())
    assert apart <= 0.02 * change + 1e-10  # what rounding in another order brings, beside what the recipe does


def test_samples_that_lie_in_files_pass_there_too(gpu: torch.device, tmp_path: Path) -> None:
    text = "- gptq: {bits: 3, group_size: 16, passes: 0}"
    wanted = swept(llama(), text, device=gpu)
    with Run(tmp_path, {"verb": "test"}) as run:
        found = swept(llama(), text, device=gpu, run=run, samples_memory=0)
    for name, codes in found.quantized.items():
        assert torch.equal(codes.codes, wanted.quantized[name].codes)


class Stopping(Gptq):
    """GPTQ, in the eyes of the run, that is stopped in the third block."""

    def solve(self, block: Any) -> None:
        if block.name == "model.layers.2":
            raise KeyboardInterrupt
        super().solve(block)

    def entry(self) -> dict[str, Any]:
        return Gptq(**GRID).entry()


def test_another_device_goes_on_and_says_so(placed: Placed, tmp_path: Path) -> None:
    straight = swept(llama(4), "- gptq: {bits: 3, group_size: 16, passes: 0}")
    candidate, model, context = opened(llama(4), 8)
    with Run(tmp_path, {"verb": "test"}) as run, pytest.raises(KeyboardInterrupt):
        Stopping(**GRID).apply(candidate, model, replace(context, run=run))
    told, (candidate, model, context) = Told(), opened(llama(4), 8)
    with Run(tmp_path, {"verb": "test"}) as run, placed() as gpu:
        Gptq(**GRID).apply(candidate, model, replace(context, run=run, device=gpu, progress=told))
    notes = [line for line in told.said if "last bits" in line]
    assert len(notes) == 1
    assert "2 blocks are finished, some of them on cpu, and cuda goes on" in notes[0]
    assert sum("passes in float32 on cuda:0" in line for line in told.said) == 2
    for name, codes in candidate.quantized.items():
        same_codes(codes, straight.quantized[name], 1.0 if ".0." in name or ".1." in name else 0.9)


# ---------------------------------------------------------------- memory


def peak(network: nn.Module, step: BlockTechnique, rows: int = 8) -> int:
    """Return the most bytes that lie on the pretended GPU while a technique is carried out."""
    with pretended() as there:
        candidate, model, context = opened(network, rows, device=GPU)
        step.apply(candidate, model, context)
    assert there.held == 0, "something was left there"
    return int(there.peak)


def wide(num_layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, intermediate_size=128, **{
        **SIZES, "num_hidden_layers": num_layers, "hidden_size": 64,
    })  # fmt: skip
    return LlamaForCausalLM(config).eval()


BLOCK = Gptq(bits=4, group_size=16, samples=64, passes=0, ignore=("lm_head",))


def test_memory_follows_the_block_not_the_model_nor_the_samples() -> None:
    few = peak(wide(2), BLOCK)
    assert peak(wide(4), BLOCK) == few
    assert peak(wide(2), BLOCK, rows=24) <= 1.02 * few


@pytest.mark.parametrize(
    "step",
    [
        BLOCK,
        Gptq(bits=4, group_size=16, ignore=("re:.*(q|k|v|o|up|gate)_proj",)),
        Awq(bits=4, group_size=16, exponents=2, ignore=("lm_head",)),
        Smooth(),
        Sparsify(),
        LearnedRounding(bits=4, group_size=16, steps=2, batch_size=2, ignore=("lm_head",)),
    ],
    ids=lambda step: step.label(),
)
def test_what_is_forecast_holds_it(step: BlockTechnique) -> None:
    network = wide(2)
    _, model, _ = opened(network)
    tokens, heads = 16, 4
    # hidden states twice, outputs of all layers of a block, scores three times: as `plan` counts a sample
    sample = 4 * tokens * (2 * 64 + 64 + 32 + 32 + 64 + 3 * 128 + 64 + 3 * heads * tokens)
    told = device_bytes(step, model, sample)
    most = max(told.values()) - sweep_device.RESERVED_BYTES
    found = peak(network, step)
    assert found <= most
    assert found >= most / 6  # and it is no idle number


def test_running_out_of_memory_says_what_to_do() -> None:
    with pytest.raises(TechniqueError, match=r"gptq ran out of memory on cuda:0: 3 GiB wanted\nhint: .*--device cpu"):  # noqa: SIM117
        with memory_errors("gptq", GPU):
            raise torch.OutOfMemoryError("3 GiB wanted\nmore")


def test_a_tensor_that_is_left_behind_would_be_seen() -> None:
    with pretended():
        there = torch.ones(2, device=GPU)
        with pytest.raises(AssertionError, match="meets tensors of main memory"):
            there + torch.ones(2)
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0]
        with pytest.raises(AssertionError, match="meets tensors of main memory"):
            inverse_factor(torch.eye(4).to(GPU), 0.01, channels_I=torch.arange(4))
