"""The calibrated techniques on tiny models: nearer to the original than plain rounding, and offered where they fit."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.example import made_up_example
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.plan.candidates import recipes, rounds_twice
from gossamer.recipe import Recipe, Step
from gossamer.run.progress import Silent
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, SearchSpace, Technique
from gossamer.techniques.quantize import calibrated
from gossamer.techniques.quantize.calibrated import Gptq, LearnedRounding
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.tune_scales import TuneScales
from gossamer.techniques.registry import resolve

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "initializer_range": 0.2, "attn_implementation": "eager",
}  # fmt: skip
GRID: dict[str, Any] = {"bits": 3, "group_size": 16, "symmetric": False}
TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
SWEEP = runpy.run_path(str(Path(__file__).parents[1] / "test_blockwise.py"))
FAMILIES = {family.__name__: family for family in SWEEP["FAMILIES"]}
TASK, logits, opened = TINY["TASK"], TINY["logits"], TINY["opened"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SIZES)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def distance(step: Technique, network: nn.Module, *then: Technique, rows: int = 32) -> float:
    """Return the squared distance of the logits to the original's, on other samples than the steps were given."""
    candidate, model, context = opened(network, rows)
    for each in (step, *then):
        candidate = each.apply(candidate, model, context)
    changed = candidate.module
    draw = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(1, 64, (1, 16), generator=draw)} for _ in range(32)]
    with torch.no_grad():
        return sum(float((logits(changed, x) - logits(network, x)).square().sum()) for x in samples)


@pytest.mark.parametrize("network", [llama, bert], ids=lambda build: build.__name__)
def test_gptq_is_nearer_to_the_original_than_plain_rounding(network: Any) -> None:
    plain = distance(Quantize(**GRID), network())
    solved = distance(Gptq(**GRID), network())
    assert solved < 0.9 * plain


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("vit", "t5", "whisper")], ids=["vit", "t5", "whisper"])
def test_encoders_pictures_speech_and_cross_attention_are_solved_block_by_block(
    family: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = family().eval()
    example = made_up_example(network)
    assert example is not None
    source = Source.open(network, forward=lambda module, inputs: module(**inputs).logits)
    candidate, model = Candidate(source=source, module=source.module(TASK)), map_model(network, example, source.forward)
    calibration = [
        Batch({name: values.numpy() for name, values in sample.items()}, np.array([number]))
        for number, sample in enumerate(SWEEP["varied"](example, 16))
    ]
    with Run(tmp_path / "run", {"verb": "test"}) as run:
        context = Context(task=TASK, example=calibration[0].inputs, calibration=calibration, progress=Silent(), run=run,
                          identity={"of": "test"})  # fmt: skip
        step = Gptq(bits=4, group_size=16)
        candidate = step.apply(candidate, model, context)
    assert all("had no factor" in note for note in candidate.fallbacks)  # inputs that hardly differ, less their mean
    decided = {decision.parameter: decision for decision in step.resolve(model)}
    assert candidate.quantized.keys() == decided.keys()
    if network.config.is_encoder_decoder:  # queries of the decoder, keys and values of the encoder's output
        crossing = [name for name in decided if ".encoder_attn." in name or ".EncDecAttention." in name]
        assert len(crossing) == 8
    for codes in candidate.quantized.values():
        low, high = codes.spec.ends if codes.spec.symmetric else (codes.spec.low, codes.spec.high)
        assert int(codes.codes.min()) >= low
        assert int(codes.codes.max()) <= high
        assert torch.isfinite(codes.dequantize()).all()
    found = [json.loads(path.read_text()) for path in (tmp_path / "run" / "steps").glob("block-*/result.json")]
    blocks = [step["value"] for step in found if step["inputs"]["stack"]]
    assert len(blocks) == sum(stack.num_blocks for stack in model.stacks)
    assert all(block["error"] < block["plain"] for block in blocks)


def test_biases_take_the_mean_errors_where_there_are_any() -> None:
    corrected, plain = Gptq(**GRID), Gptq(**GRID, correct_bias=False)
    assert distance(corrected, bert()) < 0.95 * distance(plain, bert())
    candidate, model, context = opened(bert())
    start = {name: values.clone() for name, values in candidate.module.named_parameters()}
    moved = {
        name
        for name, values in corrected.apply(candidate, model, context).module.named_parameters()
        if not torch.equal(values, start[name]) and name not in candidate.quantized
    }
    assert moved == {name.removesuffix("weight") + "bias" for name in candidate.quantized}
    assert distance(corrected, llama()) == distance(plain, llama())  # none there


@pytest.mark.parametrize("network", [llama, bert], ids=lambda build: build.__name__)
def test_layers_with_one_input_have_the_same_codes_alone_and_together(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[Candidate, list[int]]:
        candidate, model, context = opened(network())
        numbers: list[int] = []
        monkeypatch.setattr(calibrated, "gptq", lambda rows, *a, **k: numbers.append(len(rows)) or gptq(rows, *a, **k))
        return Gptq(**GRID).apply(candidate, model, context), numbers

    together, fewer = found()
    monkeypatch.setattr(calibrated, "MAX_TOGETHER", 0)
    alone, more = found()
    assert sum(fewer) == sum(more)
    assert len(fewer) < len(more)
    for name, codes in alone.quantized.items():
        assert torch.equal(codes.codes, together.quantized[name].codes)
        assert torch.equal(codes.scale, together.quantized[name].scale)


def test_learning_from_gptq_is_nearer_still() -> None:
    # what descent and refitting gain by themselves leaves little to learn from 512 tokens
    start = {**GRID, "passes": 0, "refit": False}
    assert distance(LearnedRounding(**start, steps=100, batch_size=4), llama()) < distance(Gptq(**start), llama())


def test_learning_may_start_from_the_nearest_codes() -> None:
    assert distance(LearnedRounding(**GRID, start="nearest", steps=60, batch_size=4), llama()) < distance(
        Quantize(**GRID), llama()
    )


@pytest.mark.parametrize("network", [llama, bert], ids=lambda build: build.__name__)
def test_scales_tuned_end_to_end_are_nearer_still(network: Any) -> None:
    start = Gptq(**GRID)
    tuned = distance(start, network(), TuneScales(rate=3e-3, epochs=4), rows=96)
    assert tuned < 0.95 * distance(start, network(), rows=96)


@pytest.mark.parametrize(("rows", "helps"), [(96, True), (32, False)], ids=["enough rows", "too few to learn from"])
def test_tuning_moves_scales_alone_and_only_where_rows_held_back_gain(rows: int, helps: bool) -> None:
    candidate, model, context = opened(llama(), rows)
    before = dict(Gptq(**GRID).apply(candidate, model, context).quantized)
    after = TuneScales(rate=3e-3, epochs=4).apply(candidate, model, context).quantized
    assert all(torch.equal(after[name].codes, codes.codes) for name, codes in before.items())
    assert any(not torch.equal(after[name].scale, codes.scale) for name, codes in before.items()) == helps
    for name, codes in after.items():
        assert torch.equal(candidate.values(name), codes.dequantize())


class Spoken(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_tuning_is_judged_with_the_inputs_rounded_as_they_will_be() -> None:
    spoken = Spoken()
    candidate, model, context = opened(llama(), 96)
    Quantize(bits=8, activations="static").apply(candidate, model, context)
    assert candidate.activations
    original, found = llama(), dict[str, float]()
    judged = [{"input_ids": torch.from_numpy(batch.inputs["input_ids"])} for batch in context.calibration[7::8]]
    for name, computing in (("rounded", candidate.simulated()), ("plain", nullcontext())):
        with computing, torch.no_grad():
            rows = [[logits(each, row).log_softmax(-1) for each in (original, candidate.module)] for row in judged]
        found[name] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in rows) / len(rows)
    assert found["rounded"] > 1.5 * found["plain"]
    TuneScales().apply(candidate, model, replace(context, progress=spoken))
    (line,) = [line for line in spoken.said if "held back" in line]
    assert f"{found['rounded']:.2e} before" in line


class Impatient(Silent):
    """Press Ctrl-C behind a number of steps of tuning."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        def advance(units: float) -> None:
            self.left -= int(units)
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance if label == "tune_scales: steps" else lambda units: None


def test_tuning_goes_on_where_it_stopped_and_ends_with_the_same_scales(tmp_path: Path) -> None:
    start, tuning, found = Quantize(**GRID), TuneScales(), []
    with Run(tmp_path, {}) as run:
        for progress in (Impatient(11), Impatient(100)):
            candidate, model, context = opened(bert())
            context = replace(context, run=run, progress=progress)
            start.apply(candidate, model, context)
            if progress.left == 11:
                with pytest.raises(KeyboardInterrupt):
                    tuning.apply(candidate, model, context)
                assert len(list((tmp_path / "steps").glob("scales-*"))) == 1
            else:
                found.append(tuning.apply(candidate, model, context).quantized)
        assert progress.left == 100 - 14  # all steps of two epochs are counted, those that were kept too
        kept = [entry["inputs"]["number"] for entry in run.journal() if entry["event"] == "started"]
        assert kept == [8]  # the second run began behind it
        assert not list((tmp_path / "steps").glob("scales-*"))
    candidate, model, context = opened(bert())
    found.append(tuning.apply(start.apply(candidate, model, context), model, context).quantized)
    for name, codes in found[0].items():
        assert torch.equal(codes.scale, found[1][name].scale)
        assert torch.equal(codes.codes, found[1][name].codes)


def test_tuning_needs_rounded_layers_and_enough_samples() -> None:
    candidate, model, context = opened(llama())
    with pytest.raises(TechniqueError, match="no rounded layer"):
        TuneScales().apply(candidate, model, context)
    candidate, model, context = opened(llama(), rows=5)
    with pytest.raises(TechniqueError, match="needs 8 calibration samples, 5 were given"):
        TuneScales().apply(Quantize(**GRID).apply(candidate, model, context), model, context)


def test_the_same_call_gives_the_same_codes() -> None:
    found = []
    for _ in range(2):
        candidate, model, context = opened(llama())
        found.append(LearnedRounding(**GRID, steps=5).apply(candidate, model, context).quantized)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])


def space(network: nn.Module, rows: int = 128) -> SearchSpace:
    _, model, _ = opened(network)
    return SearchSpace(model=model, runtime=get_runtime("onnxruntime"), task=TASK, calibration_rows=rows)


def test_the_planner_is_offered_grids_alone_and_with_rounded_embeddings() -> None:
    wide = LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **{**SIZES, "hidden_size": 64})
    ).eval()
    offered = list(Gptq.candidates(space(wide)))
    grids = {(run[0].bits, run[0].group_size) for run in offered if isinstance(run[0], Gptq)}
    assert grids == {(4, 64), (4, 32)}  # 3 bits take 4 in a graph
    assert any(len(run) == 2 and isinstance(run[1], Quantize) and run[1].targets == ("embedding",) for run in offered)
    ignored = next(run[0] for run in offered if isinstance(run[0], Gptq) and run[0].group_size == 64)
    assert ignored.ignore == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")  # 48 inputs
    assert not list(Gptq.candidates(space(wide, rows=16)))


def test_no_recipe_rounds_a_parameter_twice() -> None:
    here = space(llama())
    found = recipes(here)
    assert any(isinstance(step, Gptq) for steps in found for step in steps)
    assert not any(rounds_twice(steps, here.model) for steps in found)
    both = resolve(Recipe(steps=(Step(technique="quantize", settings={}), Step(technique="gptq", settings=GRID))))
    assert "model.layers.0.self_attn.q_proj.weight" in rounds_twice(both, here.model)


@pytest.mark.parametrize(
    ("step", "tokens", "given", "used"),
    [
        (Gptq(bits=4), 12, 128, 40),  # ten tokens for each of 48 inputs
        (Gptq(bits=4), 64, 128, 32),
        (Gptq(bits=4), 2, 128, 64),
        (Gptq(bits=4), 64, 20, 20),
        (Gptq(bits=4, samples=100), 64, 128, 100),
        (LearnedRounding(bits=4), 64, 128, 64),
        (Gptq(bits=4, bits_of=((8, ("q",)),)), 64, 128, 64),
    ],
    ids=["enough", "fewest", "most", "all", "as asked", "outputs", "mixed"],
)
def test_as_many_samples_as_the_widest_layer_wants(step: Gptq, tokens: int, given: int, used: int) -> None:
    batches = [Batch({"input_ids": np.ones((1, tokens), np.int64)}, np.array([0])) for _ in range(given)]
    model = opened(llama())[1]
    step = step.model_copy(update={"group_size": 16})
    assert step.num_samples(batches, step.resolve(model)) == used
    pictures = [Batch({"pixel_values": np.ones((1, 3, 8, 8), np.float32)}, np.array([0])) for _ in range(given)]
    assert step.num_samples(pictures, step.resolve(model)) == min(given, step.samples or 64)
