"""Texts become the tokenizer's own arrays; scores, divergence and loss agree with torch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gossamer.data import bind_columns, read_rows
from gossamer.errors import DataError, MeasureError, TaskError
from gossamer.models.source import Source
from gossamer.tasks import Arrays, Batch, Task, get_task
from gossamer.tasks.base import each

ROWS = [
    {"text": "a b c", "label": "ham"},
    {"text": "d e f g h i j", "label": "SPAM"},
    {"text": "k", "label": 2},
    {"text": "l m n a b", "label": "1"},
    {"text": "q r s t a c", "label": "news"},
]
TASK = get_task("text-classification", max_length=40)
Runner = Callable[[Source, Task], Callable[[Arrays], Arrays]]


def test_one_row_is_not_padded_and_labels_are_found(bert: Source) -> None:
    batches = TASK.batches(ROWS, bert)
    assert [batch.inputs["input_ids"].tolist() for batch in batches[:3:2]] == [[[2, 4, 5, 6, 3]], [[2, 14, 3]]]
    assert [batch.targets["labels"].tolist() for batch in batches] == [[0], [1], [2], [1], [2]]
    assert all(batch.inputs[name].dtype == np.int64 for batch in batches for name in batch.inputs)
    assert set(batches[0].inputs) == set(TASK.input_axes)


def test_a_batch_pads_to_its_longest_and_scores_the_same(bert: Source, runner: Runner) -> None:
    run = runner(bert, TASK)
    ones, pairs = TASK.batches(ROWS, bert), TASK.batches(ROWS, bert, batch_size=2)
    assert [batch.inputs["input_ids"].shape for batch in pairs] == [(2, 9), (2, 7), (1, 8)]
    alone = TASK.evaluate(each(run), ones)
    together = TASK.evaluate(each(run), pairs, alone)
    assert together.divergence is not None
    assert np.abs(together.divergence.sums).max() < 1e-6
    np.testing.assert_array_equal(alone.scores.sums, together.scores.sums)


def test_scores_divergence_and_loss_are_torch_s(bert: Source, runner: Runner) -> None:
    run = runner(bert, TASK)
    batches = TASK.batches(ROWS, bert)
    logits = torch.cat([torch.from_numpy(run(batch.inputs)["logits"]) for batch in batches])
    labels = torch.tensor([0, 1, 2, 1, 2])
    original = TASK.evaluate(each(run), batches)
    assert original.scores.sums.tolist() == (logits.argmax(1) == labels).double().tolist()
    assert original.scores.weights.tolist() == [1.0] * 5
    other = torch.flip(logits, [1]) * 0.5
    found = TASK.evaluate(each(lambda inputs: {"logits": other[_row(batches, inputs)].numpy()}), batches, original)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    assert found.divergence is not None
    assert found.agreement is not None
    np.testing.assert_allclose(found.divergence.sums, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert found.agreement.sums.tolist() == (logits.argmax(1) == other.argmax(1)).double().tolist()
    whole = Batch({}, np.arange(5), {"labels": labels.numpy()})
    expected_loss = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(TASK.loss({"logits": logits}, whole), expected_loss)


def _row(batches: list[Batch], inputs: Arrays) -> slice:
    index = next(index for index, batch in enumerate(batches) if batch.inputs is inputs)
    return slice(index, index + 1)


def test_quality_is_the_share_of_right_answers_kept() -> None:
    assert TASK.metric.quality(0.9, 0.9) == 1.0
    np.testing.assert_allclose(TASK.metric.quality(np.array([0.45, 0.95]), np.array([0.9, 0.9])), [0.5, 19 / 18])


def test_pairs(bert: Source) -> None:
    (batch,) = TASK.batches([{"text": "a", "text_pair": "b c", "label": 0}], bert)
    assert batch.inputs["input_ids"].tolist() == [[2, 4, 3, 5, 6, 3]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_token_ids_need_no_tokenizer() -> None:
    source = Source.open(torch.nn.Linear(2, 2), forward=lambda module, inputs: module(inputs["input_ids"].float()))
    rows = bind_columns(read_rows([{"input_ids": [4, 5, 6], "label": 1}, {"input_ids": [7], "label": 0}]), TASK)
    (batch,) = TASK.batches(rows, source, batch_size=2)
    assert batch.inputs["input_ids"].tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("label", ["eggs", 3, -1, "7", 0.5])
def test_a_label_that_the_model_does_not_know(bert: Source, label: object) -> None:
    rows = bind_columns(read_rows([ROWS[0], {"text": "b", "label": label}], name="mails"), TASK)
    with pytest.raises(DataError) as error:
        TASK.batches(rows, bert)
    assert error.value.message == (
        f"mails, row 2: the model does not know the label {label!r}; the model's labels are ham, Spam, news"
    )


def test_class_names_of_the_data_decide(bert: Source) -> None:
    (batch,) = TASK.batches([{"text": "a", "label": 0, "label_name": "spam"}], bert)
    assert batch.targets["labels"].tolist() == [1]
    with pytest.raises(DataError, match="does not know the label 'cat'"):
        TASK.batches([{"text": "a", "label": 0, "label_name": "cat"}], bert)


def test_rows_without_labels_can_be_run_but_not_scored(bert: Source, runner: Runner) -> None:
    batches = TASK.batches([{"text": "a"}], bert)
    assert not batches[0].targets
    with pytest.raises(DataError, match="no labels"):
        TASK.evaluate(each(runner(bert, TASK)), batches)
    with pytest.raises(DataError, match="row 2: the model does not know the label None"):
        TASK.batches([ROWS[0], {"text": "a"}], bert)


@pytest.mark.parametrize("tokens", [3, 5, 9, 30])
def test_latency_inputs_of_a_given_length(bert: Source, tokens: int) -> None:
    task = get_task("text-classification", max_length=40, latency_tokens=tokens)
    for batch_size in (1, 5):
        inputs = task.latency_inputs(task.batches(ROWS, bert, batch_size=batch_size))
        assert {name: values.shape for name, values in inputs.items()} == dict.fromkeys(task.input_axes, (1, tokens))
        assert inputs["input_ids"][0, [0, -1]].tolist() == [2, 3]  # [CLS] and [SEP] stay where they are
        assert set(inputs["input_ids"][0, 1:-1]) <= set(range(4, 24))
        assert inputs["attention_mask"].all()


def test_latency_inputs_are_the_row_of_median_length(bert: Source) -> None:
    for batch_size in (1, 5):
        inputs = TASK.latency_inputs(TASK.batches(ROWS, bert, batch_size=batch_size))
        assert inputs["input_ids"].tolist() == [[2, 15, 16, 17, 4, 5, 3]]  # lengths 5 9 3 7 8


def test_settings_that_do_not_fit_the_model(bert: Source) -> None:
    with pytest.raises(TaskError, match="max_length 41 is more than the 40 positions"):
        get_task("text-classification", max_length=41).batches(ROWS, bert)
    task = get_task("text-classification", max_length=10, latency_tokens=11)
    with pytest.raises(TaskError, match="latency_tokens 11 is more than max_length 10"):
        task.latency_inputs(task.batches(ROWS, bert))


def test_bad_rows_and_outputs(bert: Source, runner: Runner) -> None:
    with pytest.raises(DataError, match="row 2: the text is empty"):
        TASK.batches([ROWS[0], {"text": "", "label": 0}], bert)
    with pytest.raises(DataError, match="no rows"):
        TASK.batches([], bert)
    batches = TASK.batches(ROWS, bert)
    with pytest.raises(MeasureError, match="sample 0 is not finite"):
        TASK.evaluate(each(lambda inputs: {"logits": np.array([[0.0, np.nan, 1.0]])}), batches)
    original = TASK.evaluate(each(runner(bert, TASK)), batches)
    with pytest.raises(MeasureError, match="same batches"):
        TASK.evaluate(each(runner(bert, TASK)), batches[:2], original)
    with pytest.raises(DataError, match="label 2 occurs, but the model has 2 outputs"):
        TASK.evaluate(each(lambda inputs: {"logits": np.zeros((1, 2))}), batches)
