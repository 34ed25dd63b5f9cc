"""Recordings become what the model's own extractor makes of them, and words are those of plain greedy decoding."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from gossamer.data import bind_columns, read_rows
from gossamer.errors import DataError, TaskError
from gossamer.models.source import Source
from gossamer.tasks import Arrays, Task, get_task
from gossamer.tasks.base import each
from gossamer.tasks.speech_recognition import IGNORED, clean_words, read_sound, word_errors

TASK = get_task("speech-recognition", max_tokens=24)
TINY = runpy.run_path(str(Path(__file__).parent / "tiny_whisper.py"))
sound, RATE = TINY["sound"], TINY["RATE"]
ROWS = [
    {"audio": {"array": sound(seed), "sampling_rate": RATE}, "text": text} for seed, text in enumerate(["ab", "c d"])
]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(TINY["write_whisper"](tmp_path_factory.mktemp("whisper")))


def run_of(source: Source, task: Task) -> Any:
    module = source.module(task)

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
            return {"logits": source.forward(module, tensors, "logits").numpy()}

    return module, run


def test_inputs_are_the_extractor_s_features_and_the_transcript_without_its_last_token(whisper: Source) -> None:
    batch = TASK.batches(ROWS, whisper)[1]
    features = whisper.processor().feature_extractor(sound(1), sampling_rate=RATE, return_tensors="np")
    assert np.array_equal(batch.inputs["input_features"], features["input_features"])
    tokens = batch.inputs["decoder_input_ids"][0].tolist()
    labels = batch.targets["labels"][0].tolist()
    assert tokens[:2] == [257, 261]
    assert labels == [IGNORED, *tokens[2:], 256]
    assert whisper.processor().tokenizer.decode(tokens[2:]) == " c d"


def test_words_are_those_of_plain_greedy_decoding(whisper: Source) -> None:
    _, run = run_of(whisper, TASK)
    batches = TASK.batches(ROWS, whisper)
    found = TASK.evaluate(each(run), batches)
    right = 0
    for number, batch in enumerate(batches):
        tokens = batch.inputs["decoder_input_ids"][:, :2]
        while tokens.shape[1] - 2 < 24:
            logits = run({**batch.inputs, "decoder_input_ids": tokens})["logits"][0, -1]
            logits[[5, 6]] = -np.inf
            if tokens.shape[1] == 2:
                logits[7] = -np.inf
            if logits.argmax() == 256:
                break
            tokens = np.concatenate([tokens, [[logits.argmax()]]], axis=1)
        heard = clean_words(whisper.processor().tokenizer.decode(tokens[0, 2:].tolist(), skip_special_tokens=True))
        wanted = clean_words(str(ROWS[number]["text"]))
        assert found.scores.sums[number] == len(wanted) - word_errors(heard, wanted)
        assert found.scores.weights[number] == len(wanted)
        right += bool(heard)
    assert right, "the random model says nothing: the test compares nothing"


def test_a_model_is_equal_to_itself_and_another_is_not(whisper: Source) -> None:
    module, run = run_of(whisper, TASK)
    batches = TASK.batches(ROWS, whisper)
    reference = TASK.evaluate(each(run), batches)
    again = TASK.evaluate(each(run), batches, reference)
    assert again.divergence is not None
    assert again.agreement is not None
    assert abs(again.divergence.mean()) < 1e-5
    assert again.agreement.mean() == 1
    with torch.no_grad():
        module.get_decoder().layers[0].fc2.weight.mul_(-1)
    other = TASK.evaluate(each(run), batches, reference)
    assert other.divergence is not None
    assert other.divergence.mean() > 1e-4
    loss = TASK.loss({"logits": torch.from_numpy(run(batches[0].inputs)["logits"])}, batches[0])
    per_token = -other.kept["log_likelihood"][other.kept["sample"] == 0]
    assert float(loss) == pytest.approx(float(per_token.mean()), rel=1e-4)


def test_a_right_transcript_takes_one_pass(whisper: Source) -> None:
    labels = TASK.batches(ROWS, whisper)[0].targets["labels"][0]
    passes = []

    def sure(inputs: Arrays) -> Arrays:
        passes.append(1)
        logits = np.zeros((1, inputs["decoder_input_ids"].shape[1], 262), np.float32)
        logits[0, np.arange(len(labels) - 1) + 1, labels[1:]] = 9
        return {"logits": logits}

    found = TASK.evaluate(each(sure), TASK.batches(ROWS, whisper)[:1])
    assert found.scores.mean() == 1
    assert len(passes) == 1


def test_every_way_of_storing_gives_the_same_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(0), RATE, subtype="FLOAT")
    cells: list[Any] = [path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None},
                        {"array": sound(0), "sampling_rate": RATE}]  # fmt: skip
    for cell in cells:
        np.testing.assert_array_equal(read_sound(cell, "here", RATE), sound(0))
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([sound(0), sound(0)], 1), RATE, format="WAV", subtype="FLOAT")
    np.testing.assert_allclose(read_sound(stereo.getvalue(), "here", RATE), sound(0), atol=1e-7)
    slower = read_sound({"array": sound(0)[::2], "sampling_rate": RATE // 2}, "here", RATE)
    assert len(slower) == len(sound(0))
    np.testing.assert_allclose(slower[200:-200], sound(0)[200:-200], atol=0.02)


def test_a_folder_with_metadata_is_read_and_bad_recordings_name_their_row(whisper: Source, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,transcription\na.wav,ab\nb.wav,c d\n")
    for name, seconds in (("a", 0.5), ("b", 1.5)):
        soundfile.write(tmp_path / f"{name}.wav", sound(0, seconds), RATE)
    rows = bind_columns(read_rows(tmp_path), TASK)
    assert len(TASK.batches(rows[:1], whisper)) == 1
    with pytest.raises(DataError, match=r"line 3.*1\.5 s.*hears 1 s"):
        TASK.batches(rows, whisper)
    (tmp_path / "b.wav").write_bytes(b"RIFF....")
    with pytest.raises(DataError, match=r"line 3.*b\.wav cannot be read"):
        TASK.batches(bind_columns(read_rows(tmp_path), TASK), whisper)
    with pytest.raises(DataError, match="empty or not finite"):
        read_sound({"array": np.array([np.nan])}, "here", RATE)


def test_a_model_without_a_feature_extractor_is_refused(llama: Source) -> None:
    with pytest.raises(TaskError, match="no feature extractor"):
        TASK.batches(ROWS, llama)


def test_a_transcript_longer_than_the_decoding_is_refused(whisper: Source) -> None:
    with pytest.raises(DataError, match="51 tokens, max_tokens is 24"):
        TASK.batches([{**ROWS[0], "text": "a " * 25}], whisper)
