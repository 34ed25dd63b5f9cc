"""Calibration rows are kept apart from those that judge, looked through, and what was found is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.errors import DataError
from gossamer.plan.calibration import kept_apart
from gossamer.plan.job import Job
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.run.workspace import Run

SENTENCES = [f"the {noun} holds {number} codes of a group" for noun in ("grid", "row", "file") for number in range(30)]
PASSAGE = " ".join(f"word{number}" for number in range(60))


class Said:
    """Keep what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Any]:
        yield lambda units: None

    def say(self, message: str) -> None:
        self.lines.append(message)

    def record(self, series: str, step: int, values: Any) -> None:
        pass


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Llama with a byte-level tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("speaker")
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def opened(
    speaker: Path, tmp_path: Path, data: Any, evaluation: Any, **settings: int
) -> Iterator[tuple[Job, list[str]]]:
    said = Said()
    inputs = Inputs(
        model=speaker, task="causal-lm", data=data, evaluation=evaluation, runtime="torch", threads=1,
        task_settings={"context": 48, **settings}, calibration_rows=16, progress=said,
    )  # fmt: skip
    prepared = prepare(inputs)
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepared, run) as job:
        yield job, said.lines


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_what_was_found_is_said_with_counts_and_places(speaker: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    texts = ["", *SENTENCES[:12], "Все люди рождаются свободными и равными в своем достоинстве", " "]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with opened(speaker, tmp_path, str(file), rows(SENTENCES[40:60])) as (job, said):
        found = {one.kind: one for one in job.findings}
        assert (found["empty"].count, found["empty"].of) == (2, 15)
        assert [place.rpartition(", ")[2] for place in found["empty"].first] == ["line 1", "line 15"]
        assert [place.rpartition(", ")[2] for place in found["language"].first] == ["line 14"]
        for one in job.findings:
            assert f"{one.level}: {one.says}" in said
        assert len(job.calibration) == 15  # 13 rows say something; the Russian one is three windows


def test_chats_go_through_the_template_and_it_is_said(speaker: Path, tmp_path: Path) -> None:
    data = [{"messages": [{"role": "user", "content": text}]} for text in SENTENCES[:12]]
    with opened(speaker, tmp_path, data, rows(SENTENCES[40:60])) as (job, said):
        assert f"12 chats went through the chat template of {job.source.name}" in said
        letters = job.source.processor().convert_ids_to_tokens(job.calibration[0].inputs["input_ids"][0].tolist())
        assert "".join(letters).startswith("<user>theĠ")  # Ġ is how byte-level tokenizers spell a space


def test_rows_that_judge_never_calibrate_however_they_are_written(speaker: Path, tmp_path: Path) -> None:
    judging = rows([*SENTENCES[40:60], f"{PASSAGE} and its end"])
    leaks = [SENTENCES[41].upper(), f"  {SENTENCES[42]}\n", f"a beginning, then {PASSAGE}"]
    with opened(speaker, tmp_path, rows([*leaks, *SENTENCES[:14]]), judging) as (job, said):
        (found,) = [one for one in job.findings if one.kind == "overlap"]
        assert found.count == 1  # the other two are the same row but for case and white space
        assert any(line.startswith("2 rows of rows in memory also occur in") for line in said)
        used = {job.source.processor().decode(batch.inputs["input_ids"][0]) for batch in job.calibration}
        assert len(used) == 14
        assert not any("word1" in text or text.isupper() for text in used)


def test_a_dropped_row_is_replaced_by_the_next() -> None:
    findings: list[Any] = []
    chosen, others = rows([f"{PASSAGE} x", "b", "c"]), rows([f"y {PASSAGE}", "d", "e"])
    assert [row["text"] for row in kept_apart(chosen, others, rows([PASSAGE]), findings)] == ["b", "c", "d"]
    assert [(one.count, one.of) for one in findings] == [(2, 5)]
    with pytest.raises(DataError, match="all 2 rows to calibrate with share 50 words in a row"):
        kept_apart(chosen[:1], others[:1], rows([PASSAGE]), [])


def test_nothing_to_find_says_nothing(speaker: Path, tmp_path: Path) -> None:
    with opened(speaker, tmp_path, rows(SENTENCES[:14]), rows(SENTENCES[40:60])) as (job, said):
        assert (job.findings, said) == ((), [])


def test_all_windows_of_the_other_rows_are_there_to_learn_from(speaker: Path, tmp_path: Path) -> None:
    data = rows([" ".join([text] * 4) for text in SENTENCES[:20]])  # three windows each
    with opened(speaker, tmp_path, data, rows(SENTENCES[40:60]), max_tokens=40) as (job, _):
        assert len(job.evaluation) < len(SENTENCES[40:60])  # what is scored is bounded
        assert len(job.rows.others) == 4
        assert len(job.training) > 2 * len(job.rows.others)
