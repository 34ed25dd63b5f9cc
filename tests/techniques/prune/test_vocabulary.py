"""`vocabulary` on tiny models: the domain's texts are answered as before, stock classes open it, what it refuses."""

from __future__ import annotations

import json
import runpy
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from gossamer.errors import ModelError, RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.models.words import Words
from gossamer.recipe import Recipe, Step
from gossamer.run.progress import Silent
from gossamer.runtimes import get_runtime
from gossamer.runtimes.manifest import copy_companions
from gossamer.tasks import get_task
from gossamer.techniques.base import Context, SearchSpace, resolved
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.vocabulary import Vocabulary
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import resolve

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_words.py"))
DOMAIN, CORPUS = TINY["DOMAIN"], TINY["CORPUS"]
TASK = get_task("text-classification", max_length=60)
KINDS = ("bert", "roberta", "unigram")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: TINY[f"write_{kind}"](tmp_path_factory.mktemp(kind)) for kind in KINDS}


def opened(folder: Path, task: Any = TASK, texts: list[str] = DOMAIN) -> tuple[Candidate, ModelMap, Context]:
    source = Source.open(folder)
    batches = task.batches([{"text": text} for text in texts], source)
    counts = Counter(n for batch in batches for n in batch.inputs["input_ids"].flatten().tolist())
    candidate = Candidate(source, source.module(task))
    example = {name: torch.from_numpy(values) for name, values in batches[0].inputs.items()}
    model = map_model(candidate.module, example, source.forward)
    context = Context(task=task, example=batches[0].inputs, calibration=batches, progress=Silent())
    return candidate, replace(model, words=Words(source, lambda: counts)), context


def written(candidate: Candidate, folder: Path) -> Path:
    """Return a folder with what stock classes open."""
    candidate.module.save_pretrained(folder)
    copy_companions(candidate.source, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_stock_classes_open_it_and_answer_the_domain_as_before(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    step, (candidate, model, context) = Vocabulary(), opened(folders[kind])
    after = step.after(model)
    smaller = step.apply(candidate, model, context)
    saved = written(smaller, tmp_path / "saved")
    before, now = (
        (AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))
        for path in (folders[kind], saved)
    )
    rows = now[0].get_input_embeddings().num_embeddings
    assert rows == len(step.kept(model)) == now[0].config.vocab_size == len(now[1])
    assert rows < 0.8 * before[0].config.vocab_size
    assert sum(p.numel() for p in now[0].parameters()) == after.num_parameters
    with torch.no_grad():
        for text in DOMAIN:
            inputs = [tokenizer(text, return_tensors="pt") for _, tokenizer in (before, now)]
            assert inputs[0].tokens() == inputs[1].tokens()
            rows_of = [
                m.get_input_embeddings()(x["input_ids"]) for (m, _), x in zip((before, now), inputs, strict=True)
            ]
            assert torch.equal(*rows_of)
            logits = [m(**x).logits for (m, _), x in zip((before, now), inputs, strict=True)]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-6)  # where tensors lie in memory moves the last bit
        padded = now[1](DOMAIN[:5], padding=True, return_tensors="pt")
        alone = torch.cat([now[0](**now[1](text, return_tensors="pt")).logits for text in DOMAIN[:5]])
        torch.testing.assert_close(now[0](**padded).logits, alone)
        for text in (*CORPUS[:50], "Zürich 東京 🙂 \x00\u200b", "", "x" * 300):
            assert now[0](**now[1](text, truncation=True, max_length=60, return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_keep_their_meaning(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    step, (candidate, model, context) = Vocabulary(to="70%"), opened(folders[kind])
    saved = written(step.apply(candidate, model, context), tmp_path / "saved")
    before, now = AutoTokenizer.from_pretrained(folders[kind]), AutoTokenizer.from_pretrained(saved)
    assert now.special_tokens_map == before.special_tokens_map
    assert now.convert_ids_to_tokens(now.all_special_ids) == before.convert_ids_to_tokens(before.all_special_ids)
    config = json.loads((saved / "config.json").read_bytes())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if config.get(name) is not None and getattr(before, name) is not None:
            assert config[name] == getattr(now, name)
    assert now(now.mask_token)["input_ids"][1] == now.mask_token_id


def test_a_head_that_shares_the_embedding_is_cut_with_it(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A causal model as a technique sees it; the task itself does not allow it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=501, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=500, bos_token_id=0, eos_token_id=[2, 500], tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "tied"
    AutoTokenizer.from_pretrained(folders["roberta"]).save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    candidate, model, context = opened(folder, get_task("causal-lm", context=60))
    before, kept = candidate.module, Vocabulary().kept(model)
    smaller = Vocabulary().apply(candidate, model, context)
    module: Any = smaller.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert (module.config.pad_token_id, module.config.eos_token_id) == (len(kept) - 1, [2, len(kept) - 1])
    assert module.generation_config.eos_token_id == [2, len(kept) - 1]
    ids = torch.from_numpy(context.calibration[0].inputs["input_ids"])
    renamed = torch.tensor([[kept.index(number) for number in ids[0].tolist()]])
    with torch.no_grad():
        torch.testing.assert_close(module(renamed).logits, before(ids).logits[..., list(kept)])
    assert Vocabulary().after(model).num_parameters == sum(p.numel() for p in module.parameters())


def test_the_decision_says_how_many_stay(folders: dict[str, Path]) -> None:
    _, model, _ = opened(folders["bert"])
    (decision,), after = resolved(model, [Vocabulary(to=150)])
    assert decision.parameter == "bert.embeddings.word_embeddings: vocabulary"
    assert str(decision.cut).endswith("to 150 vocabulary")
    assert after.layer("bert.embeddings.word_embeddings").shape == (150, 32)
    assert get_runtime("torch").cut_refusal(decision.cut) is None  # type: ignore[arg-type]
    assert after.words is not None
    assert model.words is not None
    assert after.words.num_bytes < model.words.num_bytes


def test_texts_named_under_keep_stay_whole(folders: dict[str, Path]) -> None:
    _, model, _ = opened(folders["bert"])
    assert model.words is not None
    rare = next(text for text in CORPUS if not model.words.numbers_of(text) <= set(Vocabulary().kept(model)))
    assert model.words.numbers_of(rare) <= set(Vocabulary(keep=(rare,)).kept(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "0%"}, "0 of .* tokens would stay; .* must"),
        ({"to": 3}, "3 of .* tokens would stay; .* must"),
        ({"to": 100_000}, "100000 of .* tokens would stay"),
        ({"to": "100%"}, "tokens would stay"),
    ],
)
def test_sizes_that_leave_too_little_or_cut_nothing_are_refused(
    folders: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    _, model, _ = opened(folders["bert"])
    with pytest.raises(RecipeError, match=message) as found:
        Vocabulary(**settings).resolve(model)
    assert "leave from" in found.value.hint


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("prune", {"what": "vocabulary", "to": "30%"}), "write `- vocabulary: {to: 25%}`"),
        (("vocabulary", {"what": "vocabulary"}), "vocabulary has no setting 'what'"),
        (("vocabulary", {"to": "many"}), "'many' is neither a share like 50% nor a number"),
        (("vocabulary", {"to": 1.5}), "neither a share below 1 nor a whole number of units"),
    ],
)
def test_wrong_settings_are_explained(step: tuple[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        resolve(Recipe(steps=(Step(technique=step[0], settings=step[1]),)))
    assert message in found.value.message


def test_it_stands_first_and_once() -> None:
    def steps(*names: str) -> Recipe:
        cut = {"prune": {"what": "ffn", "to": "50%"}}
        return Recipe(steps=tuple(Step(technique=name, settings=cut.get(name, {})) for name in names))

    assert resolve(steps("vocabulary", "prune", "quantize"))
    with pytest.raises(RecipeError, match="quantize stands before vocabulary"):
        resolve(steps("quantize", "vocabulary"))
    with pytest.raises(RecipeError, match="vocabulary and vocabulary cannot be combined"):
        resolve(steps("vocabulary", "vocabulary"))


def test_models_whose_tokens_cannot_be_others_say_why(folders: dict[str, Path], tmp_path: Path) -> None:
    _, model, _ = opened(folders["bert"])
    assert model.words is not None
    with pytest.raises(RecipeError, match="there are no rows in which tokens are counted"):
        Vocabulary().resolve(replace(model, words=None))
    with pytest.raises(RecipeError, match="tokens stay as they are: it reads pictures"):
        Vocabulary().resolve(replace(model, words=Words(model.words.source, refusal="it reads pictures")))
    with pytest.raises(RecipeError, match=r"no number of config.json says"):
        Vocabulary().resolve(replace(model, dimensions=()))
    slow = tmp_path / "slow"
    Source.open(folders["bert"]).module(TASK).save_pretrained(slow)
    (slow / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ModelError, match=r"has no tokenizer.json") as found:
        Vocabulary().resolve(replace(model, words=Words(Source.open(slow))))
    assert "save_pretrained" in found.value.hint


def test_a_tokenizer_larger_than_the_embedding_is_refused(folders: dict[str, Path]) -> None:
    _, model, _ = opened(folders["bert"])
    (one,) = (d for d in model.dimensions if d.kind == "vocabulary")
    short = replace(model, dimensions=(replace(one, size=100),))
    with pytest.raises(RecipeError, match="the embedding has 100 rows"):
        Vocabulary().resolve(short)


def test_a_model_to_which_numbers_of_tokens_mean_something_is_refused(folders: dict[str, Path]) -> None:
    """RoBERTa counts positions from the number of its padding token: here it moves, as in no real tokenizer."""
    candidate, model, context = opened(folders["roberta"])
    module: Any = candidate.module
    module.config.pad_token_id = 55
    assert model.words is not None
    model.words.held = model.words.held - {*range(5, 40)} | {55}
    model.words.vocabulary.held = model.words.held
    with pytest.raises(TechniqueError, match="the number of a token means something to it"):
        Vocabulary().apply(candidate, model, context)


def test_it_is_proposed_where_rounding_does_not_reach(folders: dict[str, Path]) -> None:
    _, model, _ = opened(folders["bert"])
    runtime = get_runtime("onnxruntime")

    def proposed(wanted: set[str], **bounds: float) -> list[str]:
        space = SearchSpace(model, runtime, TASK, 24, frozenset(wanted), bounds)
        return [steps[0].label() for steps in Vocabulary.candidates(space)]

    assert proposed({"quality", "latency"}) == []
    assert proposed({"quality", "size"}, size=0.6) == []
    assert proposed({"size"}) == ["vocabulary of the rows"]
    assert proposed({"quality", "size"}, size=0.24) == ["vocabulary of the rows"], "there is room for them"
    model = opened(folders["bert"], texts=CORPUS)[1]
    (tight,) = proposed({"quality", "size"}, size=0.24)
    share = float(tight.removeprefix("vocabulary to ").removesuffix("%")) / 100
    left = resolved(model, [Vocabulary(to=f"{share:.0%}")])[1]
    assert model.words is not None
    assert left.words is not None
    bytes_of = {one: one.words.num_bytes + one.num_parameters for one in (model, left) if one.words is not None}
    whole = model.words.num_bytes + 4 * model.num_parameters
    assert 0.9 < bytes_of[left] / (0.24 * whole) < 1.1 < bytes_of[model] / (0.24 * whole)
    assert len(proposed({"params"}, params=0.8)) == 1


def test_a_size_that_8_bits_do_not_reach_has_room_beside_blocks_in_4(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    config = BertConfig.from_pretrained(folder, intermediate_size=64)  # which groups of 32 divide
    BertForSequenceClassification(config).save_pretrained(folder)
    model, runtime = opened(folder, texts=CORPUS)[1], get_runtime("onnxruntime")
    assert model.words is not None
    space = SearchSpace(model, runtime, TASK, 24, frozenset({"size"}), {"size": 0.18})
    ((step,),) = Vocabulary.candidates(space)
    tokens = Quantize(targets=("embedding",))
    whole = model.words.num_bytes + 4 * model.num_parameters

    def share(blocks: Quantize) -> float:
        decided, after = resolved(model, [step, blocks, tokens])
        grids = {one.layer.name: one.weight for one in decided if one.weight is not None}
        held = (runtime.stored_bytes(one.role, one.shape, grids.get(one.name), 4) for one in after.layers)
        assert after.words is not None
        return (after.words.num_bytes + sum(held)) / whole

    assert share(Quantize(bits=8)) > 0.2
    fine = Quantize(bits=4, symmetric=False, group_size=32)
    assert share(fine) == pytest.approx(0.18, rel=0.1), "positions stay in 8 bits here"

    # less time is asked for too: of blocks in 8 bits, a half or less leaves room for some
    faster = [steps[0] for steps in Vocabulary.candidates(replace(space, wanted=frozenset({"size", "latency"})))]
    assert step in faster
    assert len(faster) > 1
    step = faster[-1]
    half = Prune(what="ffn", to="25%", by="magnitude"), Prune(what="heads", to="50%", by="magnitude")
    decided, after = resolved(model, [step, *half, Quantize(bits=8), tokens])
    grids = {one.layer.name: one.weight for one in decided if one.weight is not None}
    held = sum(runtime.stored_bytes(one.role, one.shape, grids.get(one.name), 4) for one in after.layers)
    assert after.words is not None
    assert after.words.num_bytes + held < 0.2 * whole


def test_a_later_cut_of_the_same_recipe_sees_the_smaller_model(folders: dict[str, Path]) -> None:
    _, model, _ = opened(folders["bert"])
    _, after = resolved(model, [Vocabulary(), Prune(what="ffn", to="50%")])
    assert after.num_parameters < Vocabulary().after(model).num_parameters
