"""Speech recognition: a recording in, its words out (Whisper and other encoder-decoders); scored by word accuracy.

A row is a recording with its transcript. The model's inputs are the features of the sound and the transcript's tokens,
each of which it predicts from those before it ("teacher forcing"): that is what a calibration sample, a timed request
and the divergence from the original are made of. The score is that of free running: the tokens which greedy decoding
gives are turned into words, cleaned of case and punctuation, and compared with the transcript's words,

    word accuracy = 1 - word error rate = 1 - (substituted + left out + added words) / words of the transcript

which is below 0 where a model adds more than there is. A recording's score is a sum over its words.

Greedy decoding takes one pass a token. The same tokens are found in fewer passes by fixed-point iteration (Santilli et
al., "Accelerating Transformer Inference for Translation via Parallel Decoding", 2023, section 3.2): begin with a guess,
the transcript; put at every position the most likely token after the guess's tokens before it; again, until nothing
changes. After pass n the first n tokens are those of greedy decoding, and a model that hears well is done in one to
four. Tokens that the model's generation_config.json suppresses are never chosen.

Left out: recordings longer than the model's window (30 s for Whisper) are an error, not cut; beams; time stamps;
models that emit a letter for each frame (CTC).

Legend: T tokens of the decoder's input, V vocabulary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from gossamer.data.table import place_of
from gossamer.errors import DataError, MeasureError, TaskError
from gossamer.tasks.base import Arrays, Batch, Evaluation, Metric, Row, RunAll, Scores, Task
from gossamer.tasks.causal_lm import score_tokens
from gossamer.tasks.classification import share_kept
from gossamer.tasks.tokens import text_of

if TYPE_CHECKING:
    from gossamer.models.source import Source

DECODER = "decoder_input_ids"
IGNORED = -100  # torch's mark for targets that do not count
EXTRA = 'pip install "gossamer[speech]"'


@plain_dataclass(frozen=True)
class Transcriber:
    """Hold how a model's tokens become words: its tokenizer, the end token, and tokens that are never chosen."""

    tokenizer: Any
    end: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @classmethod
    def of(cls, source: Source, processor: Any) -> Transcriber:
        """Read the model's generation_config.json, where there is one."""
        path = source.path / "generation_config.json" if source.path is not None else None
        found = json.loads(path.read_bytes()) if path is not None and path.is_file() else {}
        never, first = found.get("suppress_tokens") or (), found.get("begin_suppress_tokens") or ()
        return cls(processor.tokenizer, int(processor.tokenizer.eos_token_id), tuple(never), tuple(first))

    def words(self, tokens: Iterable[int]) -> list[str]:
        """Return the words of some tokens, without case, punctuation and what stands in brackets."""
        return clean_words(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def clean_words(text: str) -> list[str]:
    """Return a text's words without case and punctuation (the published Whisper evaluation's basic normaliser).

    >>> clean_words("Hello, there!")
    ['hello', 'there']
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    cleaned: str = BasicTextNormalizer()(text)
    return cleaned.split()


def word_errors(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Return how many words must be replaced, added or taken out to turn one list into the other.

    >>> word_errors(["the", "cat"], ["a", "cat", "sat"])
    2
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise TaskError("speech-recognition needs the package rapidfuzz", EXTRA) from error
    return int(Levenshtein.distance(found, wanted))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SpeechRecognition(Task):
    """Set how recordings are transcribed: greedy decoding ends at the latest after `max_tokens` tokens.

    >>> task = SpeechRecognition(max_tokens=200)
    """

    max_tokens: Annotated[int, Field(ge=1)] = 200
    top_k: Annotated[int, Field(ge=1)] = 64

    name: ClassVar[str] = "speech-recognition"
    auto_class: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    metric: ClassVar[Metric] = Metric("word accuracy", "", True, figure=lambda mean: mean, quality=share_kept)
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": ("sound", "speech", "recording", "clip", "wav", "file_name", "filename", "file", "path"),
        "text": ("transcript", "transcription", "sentence", "words", "label"),
    }
    tokens_fixed: ClassVar[str] = "its transcripts are written in tokens, which are scored one by one"
    made_up_words: ClassVar[int] = 9
    profile_samples: ClassVar[int] = 16
    input_axes: ClassVar[dict[str, dict[int, str]]] = {
        "input_features": {0: "batch"},
        DECODER: {0: "batch", 1: "tokens"},
    }

    def batches(self, rows: Sequence[Row], source: Source, *, batch_size: int = 1) -> list[Batch]:
        """Return one batch for each recording: its features, and the transcript's tokens but for the last.

        Transcripts differ in length, so a batch is always one recording, whatever `batch_size`.
        """
        del batch_size
        if not rows:
            raise DataError("there are no rows", "give at least one row")
        processor = source.processor()
        extractor = getattr(processor, "feature_extractor", None)
        if extractor is None or getattr(processor, "tokenizer", None) is None:
            raise TaskError(
                f"{source.name} has no feature extractor and tokenizer together",
                "speech-recognition is for encoder-decoders as Whisper; save the processor beside the model",
            )
        transcriber = Transcriber.of(source, processor)
        prefix = _prefix(source, transcriber.tokenizer)
        found = []
        for index, row in enumerate(rows):
            place = place_of(row, index)
            sound = read_sound(row.get("audio"), place, extractor.sampling_rate)
            seconds, longest = len(sound) / extractor.sampling_rate, getattr(extractor, "chunk_length", None)
            if longest is not None and seconds > longest:
                raise DataError(
                    f"{place}: the recording has {seconds:.1f} s, {source.name} hears {longest} s",
                    "cut it into shorter recordings, or remove the row",
                )
            features = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="np")
            text = " " + text_of(row, "text", index).strip()  # as models write it: the first word has its space too
            tokens = [*prefix, *transcriber.tokenizer(text, add_special_tokens=False)["input_ids"], transcriber.end]
            if len(tokens) - len(prefix) > self.max_tokens:
                raise DataError(
                    f"{place}: the transcript has {len(tokens) - len(prefix)} tokens, max_tokens is {self.max_tokens}",
                    "cut the recording into shorter ones, or raise max_tokens up to what the decoder holds",
                )
            name = extractor.model_input_names[0]
            inputs: Arrays = {
                name: np.asarray(features[name], dtype=np.float32),
                DECODER: np.array([tokens[:-1]], dtype=np.int64),
            }
            targets: Arrays = {"labels": np.array([tokens[1:]], dtype=np.int64)}
            targets["labels"][:, : len(prefix) - 1] = IGNORED
            found.append(Batch(inputs, np.array([index]), targets, transcriber))
        return found

    def latency_inputs(self, batches: Sequence[Batch]) -> Arrays:
        """Return the recording with the transcript of median length: one pass through encoder and decoder."""
        if not batches:
            raise TaskError("there is no row to make a request of", "give at least one row")
        return sorted(batches, key=lambda batch: batch.inputs[DECODER].shape[1])[(len(batches) - 1) // 2].inputs

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean cross entropy of the transcript's tokens against the logits [1, T, V] before them."""
        logits = outputs[self.output]
        labels = torch.as_tensor(batch.targets["labels"], device=logits.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def evaluate(self, run_all: RunAll, batches: Sequence[Batch], reference: Evaluation | None = None) -> Evaluation:
        """Transcribe every recording; see the head of this file.

        `kept`: `sample` and `choice` [T] int32 and the most likely tokens of every transcript's token, as causal-lm
        keeps them. Raises MeasureError when an output is not finite, or the reference heard other recordings.
        """
        if not batches:
            raise MeasureError("there is nothing to evaluate: no batches", "give at least one evaluation row")
        parts: list[Arrays] = []
        heard = [Hearing(batch, self.max_tokens) for batch in batches]
        done = 0
        for batch, hearing, outputs in zip(batches, heard, run_all([batch.inputs for batch in batches]), strict=True):
            logits_TV, labels = np.asarray(outputs[self.output])[0], batch.targets["labels"][0]
            first = hearing.num_given - 1  # the prefix is given, not heard
            count = len(labels) - first
            original = None
            if reference is not None:
                original = {name: reference.kept[name][done : done + count] for name in _KEPT}
            part = score_tokens(logits_TV[first:], labels[first:], self.top_k, original)
            part["sample"] = np.full(count, batch.samples[0], dtype=np.int32)
            parts.append(part)
            done += count
            hearing.hear(logits_TV)
        while unsettled := [hearing for hearing in heard if not hearing.settled]:
            for hearing, outputs in zip(unsettled, run_all([one.inputs() for one in unsettled]), strict=True):
                hearing.hear(np.asarray(outputs[self.output])[0])
        pairs = [(hearing.words(), hearing.wanted()) for hearing in heard]
        right = [len(wanted) - word_errors(found, wanted) for found, wanted in pairs]
        scores = Scores(np.array(right, np.float64), np.array([len(wanted) for _, wanted in pairs], np.float64))
        kept = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if reference is None:
            return Evaluation(scores, kept)
        agree = kept["choice"] == reference.kept["choice"]
        divergence = _of_each(kept["sample"], kept["divergence"])
        return Evaluation(scores, kept, divergence, _of_each(kept["sample"], agree))


class Hearing:
    """Follow one recording's greedy decoding from guess to guess; the transcript is the first."""

    def __init__(self, batch: Batch, max_tokens: int) -> None:
        assert isinstance(batch.extra, Transcriber)
        self.batch = batch
        self.max_tokens = max_tokens
        self.transcriber = batch.extra
        self.num_given = int((batch.targets["labels"] == IGNORED).sum()) + 1
        self.guess: list[int] = batch.inputs[DECODER][0, self.num_given :].tolist()
        self.settled = False
        self.passes = 0

    def inputs(self) -> Arrays:
        """Return the inputs of the next pass: the recording with the guess."""
        given = self.batch.inputs[DECODER][0, : self.num_given].tolist()
        return {**self.batch.inputs, DECODER: np.array([[*given, *self.guess]], dtype=np.int64)}

    def hear(self, logits_TV: NDArray[Any]) -> None:
        """Take the logits behind the guess's tokens for the next guess; raise MeasureError where it never settles."""
        end = self.transcriber.end
        choices = _choices(logits_TV[self.num_given - 1 :], self.transcriber)
        ended = end in choices
        found = choices[: choices.index(end)] if ended else choices
        found = found[: self.max_tokens]
        whole = ended or len(found) == self.max_tokens
        self.settled = whole and found == self.guess[: self.max_tokens]
        self.guess = found
        self.passes += 1
        if not self.settled and self.passes > self.max_tokens + 1:
            raise MeasureError("decoding did not settle", "the model gives other outputs for the same inputs")

    def words(self) -> list[str]:
        """Return the words of the settled guess."""
        return self.transcriber.words(self.guess)

    def wanted(self) -> list[str]:
        """Return the words of the transcript."""
        return self.transcriber.words(self.batch.targets["labels"][0, self.num_given - 1 :])


_KEPT = ("top_tokens", "top_log_probs")


def _of_each(samples: NDArray[Any], values: NDArray[Any]) -> Scores:
    """Return the sums of a value over each sample's tokens."""
    sums = np.bincount(samples, weights=values.astype(np.float64))
    return Scores(sums.astype(np.float64), np.bincount(samples).astype(np.float64))


def _choices(logits_TV: NDArray[Any], transcriber: Transcriber) -> list[int]:
    """Return the most likely token behind each position but for suppressed ones."""
    logits = logits_TV.astype(np.float32)
    logits[:, list(transcriber.suppressed)] = -np.inf
    logits[0, list(transcriber.suppressed_first)] = -np.inf
    return [int(token) for token in logits.argmax(axis=1)]


def _prefix(source: Source, tokenizer: Any) -> list[int]:
    """Return the tokens that a transcript begins with: start, language, task, as the tokenizer was saved."""
    found = getattr(tokenizer, "prefix_tokens", None)
    if found:
        return [int(token) for token in found]
    start = getattr(source.config, "decoder_start_token_id", None)
    if start is None:
        raise TaskError(
            f"{source.name} does not say which token a transcript begins with", "set decoder_start_token_id"
        )
    return [int(start)]


def read_sound(cell: Any, place: str, rate: int) -> NDArray[np.float32]:
    """Return a recording [samples] at `rate`, one channel, from a path, encoded bytes, or {"array", "sampling_rate"}.

    Raises DataError naming the place when it is missing, empty, or not a recording.
    """
    found, found_rate = cell, rate
    if isinstance(cell, Mapping):
        found, found_rate = cell.get("array"), int(cell.get("sampling_rate") or rate)
        if found is None:
            found = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(found, bytes | str | Path):
        found, found_rate = _decoded(found, place)
    if not isinstance(found, np.ndarray | list):
        raise DataError(
            f"{place}: no recording but a {type(cell).__name__}", "say which column holds it: --column audio=NAME"
        )
    sound = np.asarray(found, dtype=np.float32)
    sound = sound.mean(axis=1) if sound.ndim == 2 else sound
    if not sound.size or not np.isfinite(sound).all():
        raise DataError(f"{place}: the recording is empty or not finite", "remove the row, or replace it")
    if found_rate != rate:
        from scipy.signal import resample_poly  # a second and a half that other tasks need not pay

        shared = int(np.gcd(found_rate, rate))
        sound = resample_poly(sound, rate // shared, found_rate // shared).astype(np.float32)
    return sound


def _decoded(file: bytes | str | Path, place: str) -> tuple[NDArray[np.float32], int]:
    """Return samples [N, channels] and their rate."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise TaskError("reading recordings needs the package soundfile", EXTRA) from error
    try:
        readable = io.BytesIO(file) if isinstance(file, bytes) else file
        sound, rate = soundfile.read(readable, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError, TypeError) as error:
        named = "" if isinstance(file, bytes) else f" {file}"
        raise DataError(
            f"{place}: the recording{named} cannot be read: {error}", "remove the row, or replace it"
        ) from error
    return sound, int(rate)
