"""Windows cover each document once; scores equal a slow loop over tokens; the divergence is a close lower bound."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gossamer.errors import DataError, MeasureError, TaskError
from gossamer.models.source import Source
from gossamer.tasks import Arrays, Task, get_task
from gossamer.tasks.base import each
from gossamer.tasks.causal_lm import bucket_divergence, score_tokens

DOCUMENTS = [{"text": " ".join("abcdefghijklmnopqrst"[:length])} for length in (20, 3, 1, 17, 9)]
TASK = get_task("causal-lm", context=8)
Runner = Callable[[Source, Task], Callable[[Arrays], Arrays]]


def test_windows_cover_each_document_and_are_never_padded(llama: Source) -> None:
    for batch_size in (1, 3):
        batches = TASK.batches(DOCUMENTS, llama, batch_size=batch_size)
        assert all(batch.inputs["attention_mask"].all() for batch in batches)
        windows = [
            (int(s), row.tolist()) for b in batches for s, row in zip(b.samples, b.inputs["input_ids"], strict=True)
        ]
        # 20 = 8 + 8 + 4, 3, (1: nothing to score), 17 = 8 + 8 + (1), 9 = 8 + (1)
        assert [(s, len(tokens)) for s, tokens in windows] == [(0, 8), (0, 8), (2, 8), (2, 8), (3, 8), (0, 4), (1, 3)]
        assert [token for s, tokens in windows if s == 0 for token in tokens] == list(range(4, 24))


def test_scores_equal_a_slow_loop(llama: Source, runner: Runner) -> None:
    module = llama.module(TASK)
    expected = []
    for length in (20, 3, 17, 9):
        ids = list(range(4, 4 + length))
        total = 0.0
        for start in range(0, length, 8):
            window = ids[start : start + 8]
            for position in range(1, len(window)):
                with torch.inference_mode():
                    logits = module(torch.tensor([window[:position]])).logits[0, -1]
                total += float(logits.log_softmax(-1)[window[position]])
        expected.append(total)
    for batch_size in (1, 3):
        found = TASK.evaluate(each(runner(llama, TASK)), TASK.batches(DOCUMENTS, llama, batch_size=batch_size))
        np.testing.assert_allclose(found.scores.sums, expected, rtol=1e-4)
        assert found.scores.weights.tolist() == [17, 2, 14, 7]
    perplexity = float(TASK.metric.figure(found.scores.mean()))
    assert perplexity == pytest.approx(np.exp(-sum(expected) / 40), rel=1e-4)
    assert TASK.metric.quality(-np.log(12.5), -np.log(10.0)) == pytest.approx(0.8)


def test_max_tokens_is_exact_and_takes_documents_in_turns(llama: Source, runner: Runner) -> None:
    for limit in (1, 7, 8, 18, 20, 40):
        task = get_task("causal-lm", context=8, max_tokens=limit)
        found = task.evaluate(each(runner(llama, task)), task.batches(DOCUMENTS, llama))
        assert found.scores.weights.sum() == limit
        if limit == 18:
            assert found.scores.weights.tolist() == [7, 2, 7, 2]  # a first window of each, the last one cut
    assert found.scores.weights.tolist() == [17, 2, 14, 7]


def test_a_model_agrees_with_itself_and_with_no_other(llama: Source, runner: Runner) -> None:
    run = runner(llama, TASK)
    batches = TASK.batches(DOCUMENTS, llama)
    original = TASK.evaluate(each(run), batches)
    same = TASK.evaluate(each(run), batches, original)
    assert same.divergence is not None
    assert same.agreement is not None
    assert (same.divergence.mean(), same.agreement.mean()) == (0.0, 1.0)
    other = TASK.evaluate(each(lambda inputs: {"logits": -run(inputs)["logits"]}), batches, original)
    assert other.divergence is not None
    assert other.agreement is not None
    assert other.divergence.mean() > 0.1
    assert other.agreement.mean() == 0.0
    assert other.divergence.weights.tolist() == other.scores.weights.tolist()


def exact_divergence(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    logs = (q.double().log_softmax(-1), p.double().log_softmax(-1))
    return torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1).numpy()


def peaked(num_tokens: int, vocabulary: int) -> torch.Tensor:
    """Return logits whose 64 largest hold about 98 % of the mass: a model that is sure of a handful of words."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_tokens, vocabulary, generator=generator) * 5


def test_divergence_is_a_lower_bound_within_two_percent() -> None:
    p = peaked(300, 2000)
    q = p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(8))
    targets = np.zeros(300, dtype=np.int64)
    original = score_tokens(p.numpy(), targets, 64)
    assert np.exp(original["top_log_probs"]).sum(1).mean() == pytest.approx(0.98, abs=0.015)
    found = score_tokens(q.numpy(), targets, 64, original)["divergence"]
    exact = exact_divergence(p, q)
    assert (found <= exact + 1e-6).all()
    assert found.mean() == pytest.approx(exact.mean(), rel=0.02)


def test_divergence_is_exact_when_all_tokens_are_kept() -> None:
    p = peaked(50, 40)
    q = p + torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
    targets = np.zeros(50, dtype=np.int64)
    found = score_tokens(q.numpy(), targets, 64, score_tokens(p.numpy(), targets, 64))["divergence"]
    np.testing.assert_allclose(found, exact_divergence(p, q), atol=1e-5)


def test_the_bucket_counts_once() -> None:
    log_p, log_q = np.log([[0.5, 0.3]]), np.log([[0.4, 0.2]])
    expected = 0.5 * np.log(5 / 4) + 0.3 * np.log(3 / 2) + 0.2 * np.log(0.2 / 0.4)
    assert bucket_divergence(log_p, log_q)[0] == pytest.approx(expected)


def test_loss_is_torch_s_own(llama: Source) -> None:
    module = llama.module(TASK)
    (batch, *_) = TASK.batches(DOCUMENTS, llama, batch_size=3)
    ids = torch.from_numpy(batch.inputs["input_ids"])
    with torch.inference_mode():
        outputs = module(ids, labels=ids)
    torch.testing.assert_close(TASK.loss({"logits": outputs.logits}, batch), outputs.loss)


def test_latency_inputs(llama: Source) -> None:
    assert TASK.latency_inputs(TASK.batches(DOCUMENTS, llama))["input_ids"].shape == (1, 8)
    for tokens in (2, 5, 8):
        task = get_task("causal-lm", context=8, latency_tokens=tokens)
        inputs = task.latency_inputs(task.batches(DOCUMENTS, llama))
        assert [values.shape for values in inputs.values()] == [(1, tokens)] * 2
    task = get_task("causal-lm", context=8, latency_tokens=9)
    with pytest.raises(TaskError, match="latency_tokens 9 is more than context 8"):
        task.latency_inputs(task.batches(DOCUMENTS, llama))


def test_token_ids_need_no_tokenizer(llama: Source) -> None:
    ready = [{"text": np.arange(4, 4 + len(row["text"].split()))} for row in DOCUMENTS]
    source = Source.open(torch.nn.Linear(1, 1), forward=lambda module, inputs: inputs["input_ids"])
    found, expected = TASK.batches(ready, source), TASK.batches(DOCUMENTS, llama)
    assert [b.inputs["input_ids"].tolist() for b in found] == [b.inputs["input_ids"].tolist() for b in expected]


def test_errors(llama: Source, runner: Runner) -> None:
    with pytest.raises(TaskError, match="context 65 is more than the 64 positions"):
        get_task("causal-lm", context=65).batches(DOCUMENTS, llama)
    with pytest.raises(DataError, match="books, line 2: the text is empty"):
        TASK.batches([DOCUMENTS[0], {"text": " ", "place": "books, line 2"}], llama)
    with pytest.raises(DataError, match="none of 1 rows has two tokens"):
        TASK.batches([{"text": "a"}], llama)
    run = runner(llama, TASK)
    batches = TASK.batches(DOCUMENTS, llama)
    original = TASK.evaluate(each(run), batches)
    with pytest.raises(MeasureError, match="same batches"):
        TASK.evaluate(each(run), batches[:2], original)
    with pytest.raises(MeasureError, match="not finite"):
        TASK.evaluate(each(lambda inputs: {"logits": np.full((*inputs["input_ids"].shape, 24), np.nan)}), batches)


def test_calibration_takes_windows_of_all_documents_whatever_is_scored() -> None:
    rows = [{"text": list(range(1, 41))}, {"text": list(range(41, 61))}, {"text": list(range(61, 66))}]
    task = get_task("causal-lm", context=10, max_tokens=9)
    source = Source.open(torch.nn.Linear(1, 1), forward=lambda module, inputs: inputs["input_ids"])
    found = task.calibration(rows, source, 5)
    assert len(found) == 5
    assert sorted(int(batch.inputs["input_ids"][0, 0]) for batch in found) == [1, 11, 41, 51, 61]
