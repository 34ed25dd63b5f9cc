"""Causal language models: text in, the probability of each next token out; scored by perplexity.

A row is a document: a text as it is, or a conversation in the model's chat template (`chat.py`). Its tokens are cut
into windows of `context` tokens that do not overlap; a last, shorter window of at least two tokens is kept. Within a
window every token but the first is scored from those before it. A document's score is the sum of its tokens'
log-likelihoods (nats) with the number of tokens as weight, so

    perplexity = exp(-sum of sums / sum of weights),   quality = exp(mean_candidate - mean_original) = ppl_o / ppl_c

Divergence from the original is KL(p || q) per token, p the original, q the candidate. Keeping all of p would take
200 kB a token, so `top_k` of its log-probabilities are kept and the rest of the vocabulary is one bucket:

    KL_k = sum_{i in top k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

By the log-sum inequality KL_k <= KL, and what is missing is exactly p_rest * KL(p | rest  ||  q | rest): the divergence
within the bucket, times its mass. It vanishes where the candidate scales the bucket as a whole, and is small when the
top k hold nearly all of the mass. Measured on SmolLM2-135M against a crude 4-bit copy: the top 64 hold 91 %, and an
exact 1.232 nats reads as 0.978 (k = 16), 1.102 (k = 64) or 1.171 (k = 256).

Only one batch of logits is in memory at a time, and is worked on in slices of `_SLICE` positions.

Legend: T scored positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from gossamer.data.columns import is_token_ids
from gossamer.errors import DataError, MeasureError, TaskError
from gossamer.tasks.base import Arrays, Batch, Evaluation, Metric, Row, RunAll, Scores, Task, Written
from gossamer.tasks.chat import rendered
from gossamer.tasks.tokens import accepted_inputs, check_length, described, median_request

if TYPE_CHECKING:
    from gossamer.models.source import Source

_SLICE = 128
_AXES = {0: "batch", 1: "sequence"}


def perplexity(mean: Any) -> Any:
    """Return the perplexity of a mean log-likelihood in nats per token; works on arrays too."""
    return np.exp(-np.asarray(mean))


def perplexity_kept(candidate: Any, original: Any) -> Any:
    """Return original perplexity / candidate perplexity from mean log-likelihoods; works on arrays too."""
    return np.exp(np.asarray(candidate) - np.asarray(original))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CausalLM(Task):
    """Set how documents become windows: `context` tokens each, at most `max_tokens` scored tokens in all.

    `top_k` log-probabilities of the original are kept for each token. A timed request is the window of median length,
    made `latency_tokens` long when that is set.

    >>> task = CausalLM(context=512, max_tokens=50_000)
    """

    context: Annotated[int, Field(ge=2)] = 512
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] = 64
    latency_tokens: Annotated[int, Field(ge=1)] | None = None

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[Metric] = Metric("perplexity", "", False, figure=perplexity, quality=perplexity_kept)
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("content", "document", "body", "article", "passage", "sentence", "story", "message", "completion"),
        "messages": ("conversations", "conversation", "chat", "dialog"),
        "prompt": ("instruction", "question"),
        "completion": ("response", "answer", "output"),
    }
    optional_columns: ClassVar[frozenset[str]] = frozenset({"messages", "prompt", "completion"})
    instead: ClassVar[dict[str, tuple[tuple[str, ...], ...]]] = {"text": (("messages",), ("prompt", "completion"))}
    leaves_out_empty: ClassVar[bool] = True
    tokens_fixed: ClassVar[str] = "its score is a sum over tokens, and two models that cut a text otherwise have others"
    profile_samples: ClassVar[int] = 24  # each scores hundreds of tokens
    input_axes: ClassVar[dict[str, dict[int, str]]] = {"input_ids": _AXES, "attention_mask": _AXES}

    def batches(self, rows: Sequence[Row], source: Source, *, batch_size: int = 1) -> list[Batch]:
        """Return windows, those of the same length together, so that none is padded.

        Samples are documents, numbered in order of the rows; a document of fewer than two tokens has nothing to score
        and is not a sample. With `max_tokens` every document gives its first window before any gives its second, until
        so many tokens are scored: an interval over documents needs many of them, not much of one.
        A text may also be a list of token ids, for models without a tokenizer.
        """
        tokenizer = None if all(is_token_ids(row.get("text")) for row in rows) else source.processor()
        check_length(self.context, "context", source, tokenizer)
        windows = self._windows(rows, tokenizer)
        if not windows:
            raise DataError(
                f"none of {len(rows)} rows has two tokens or more", "a model needs a token to predict the next"
            )
        names = accepted_inputs(source, ["input_ids", "attention_mask"])
        by_length: dict[int, list[_Window]] = {}
        for window in windows:
            by_length.setdefault(len(window.tokens), []).append(window)
        found = []
        for length in sorted(by_length, reverse=True):
            alike = by_length[length]
            for start in range(0, len(alike), batch_size):
                part = alike[start : start + batch_size]
                ids = np.stack([window.tokens for window in part])
                inputs: Arrays = {"input_ids": ids}
                if "attention_mask" in names:
                    inputs["attention_mask"] = np.ones_like(ids)
                found.append(Batch(inputs, np.array([window.sample for window in part], dtype=np.int64)))
        return found

    def calibration(self, rows: Sequence[Row], source: Source, count: int) -> list[Batch]:
        """Return at most `count` windows, taken from the documents in turns; `max_tokens` does not bound them."""
        batches = replace(self, max_tokens=None).batches(rows, source, batch_size=1)
        seen: dict[int, int] = {}
        turns = []
        for position, batch in enumerate(batches):  # longest windows first, each document's in order
            sample = int(batch.samples[0])
            seen[sample] = seen.get(sample, -1) + 1
            turns.append((seen[sample], position))
        return [batches[position] for _, position in sorted(turns)[:count]]

    def _windows(self, rows: Sequence[Row], tokenizer: Any) -> list[_Window]:
        documents: list[list[_Window]] = []
        for index, row in enumerate(rows):
            tokens = _tokens(row, index, tokenizer)
            starts = range(0, len(tokens) - 1, self.context)
            if starts:
                documents.append([_Window(tokens[start : start + self.context], len(documents)) for start in starts])
        if self.max_tokens is None:
            return [window for document in documents for window in document]
        return _spread(documents, self.max_tokens)

    def written(self, rows: Sequence[Row], source: Source) -> list[Written]:
        """Return the text and the number of tokens of each row; rows that are tokens already are passed over."""

        def describe(row: Row, index: int, tokenizer: Any) -> Written:
            what = rendered(row, index, tokenizer)
            return Written(what.text, len(_tokens(row, index, tokenizer)), self.context, fills=True, form=what.form)

        return described(rows, source, describe)

    def latency_inputs(self, batches: Sequence[Batch]) -> Arrays:
        """Return the window of median length, batch 1, made `latency_tokens` tokens long when that is set."""
        if self.latency_tokens is not None and self.latency_tokens > self.context:
            raise TaskError(
                f"latency_tokens {self.latency_tokens} is more than context {self.context}",
                f"no request is that long: raise context to {self.latency_tokens}",
            )
        return median_request(batches, self.latency_tokens)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean cross entropy of every token but the first against the logits [B, T, V] before it."""
        logits = outputs[self.output][:, :-1]
        tokens = torch.as_tensor(batch.inputs["input_ids"][:, 1:], device=logits.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def evaluate(self, run_all: RunAll, batches: Sequence[Batch], reference: Evaluation | None = None) -> Evaluation:
        """Score every document; see the head of this file.

        `kept`, in the order of the batches: `sample` [T] int32, `log_likelihood` [T] and `choice` [T] int32 (the most
        likely token); without a reference also `top_tokens` [T, K] int32 and `top_log_probs` [T, K] float32.
        Raises MeasureError when an output is not finite, or the reference saw other tokens.
        """
        parts: list[Arrays] = []
        done = 0
        for batch, outputs in zip(batches, run_all([batch.inputs for batch in batches]), strict=True):
            logits = np.asarray(outputs[self.output])
            for row, sample in enumerate(batch.samples):
                targets = batch.inputs["input_ids"][row, 1:]
                for start in range(0, len(targets), _SLICE):
                    stop = min(start + _SLICE, len(targets))
                    original = None if reference is None else _part(reference.kept, done, stop - start)
                    found = score_tokens(logits[row, start:stop], targets[start:stop], self.top_k, original)
                    found["sample"] = np.full(stop - start, sample, dtype=np.int32)
                    parts.append(found)
                    done += stop - start
        if not parts:
            raise MeasureError("there is nothing to evaluate: no batches", "give at least one evaluation row")
        kept = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        samples = kept["sample"]
        weights = np.bincount(samples).astype(np.float64)
        scores = Scores(_sums(samples, kept["log_likelihood"]), weights)
        if reference is None:
            return Evaluation(scores, kept)
        if done != len(reference.kept["choice"]):
            raise _other_tokens(len(reference.kept["choice"]), done)
        agree = kept["choice"] == reference.kept["choice"]
        return Evaluation(
            scores,
            {name: kept[name] for name in ("sample", "log_likelihood", "choice")},
            Scores(_sums(samples, kept["divergence"]), weights),
            Scores(_sums(samples, agree), weights),
        )


@plain_dataclass(frozen=True)
class _Window:
    tokens: NDArray[np.int64]
    sample: int


def _tokens(row: Row, index: int, tokenizer: Any) -> NDArray[np.int64]:
    """Return the tokens of a row: those that it holds, or those of what the model reads of it."""
    cell = row.get("text")
    if is_token_ids(cell):
        return np.array(cell, dtype=np.int64)
    what = rendered(row, index, tokenizer)
    ids = tokenizer(what.text, verbose=False, add_special_tokens=not what.has_special_tokens)["input_ids"]
    return np.array(ids, dtype=np.int64)


def score_tokens(
    logits_TV: NDArray[Any], targets_T: NDArray[np.int64], top_k: int, original: Arrays | None = None
) -> Arrays:
    """Return `log_likelihood` [T] of the targets and `choice` [T], from logits that stand one position before each.

    Without `original` also its `top_tokens` and `top_log_probs` [T, K]; with an original's, `divergence` [T]: the
    lower bound of KL(original || these logits) in nats. Raises MeasureError when a logit is not finite.
    """
    # float32 as stored: what is subtracted later must round alike for both models
    logits = torch.from_numpy(np.ascontiguousarray(logits_TV, dtype=np.float32))
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        raise MeasureError("the logits are not finite", "the model overflows or holds NaN weights")
    index = torch.from_numpy(np.ascontiguousarray(targets_T))[:, None]
    found: Arrays = {
        "log_likelihood": (logits.gather(1, index) - total)[:, 0].numpy(),
        "choice": logits.argmax(dim=-1).to(torch.int32).numpy(),
    }
    if original is None:
        top = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
        found["top_tokens"] = top.indices.to(torch.int32).numpy()
        found["top_log_probs"] = (top.values - total).numpy()
        return found
    if len(original["top_tokens"]) != len(targets_T):
        raise _other_tokens(len(original["top_tokens"]), len(targets_T))
    tokens = torch.from_numpy(original["top_tokens"].astype(np.int64))
    found["divergence"] = bucket_divergence(original["top_log_probs"], (logits.gather(1, tokens) - total).numpy())
    return found


def bucket_divergence(original_TK: NDArray[Any], candidate_TK: NDArray[Any]) -> NDArray[np.float64]:
    """Return KL(p || q) [T] in nats from log-probabilities of the same K tokens, all other tokens as one bucket.

    A lower bound; what is missing is the mass of the bucket times the divergence within it.
    """
    log_p, log_q = original_TK.astype(np.float64), candidate_TK.astype(np.float64)
    p = np.exp(log_p)
    # the K tokens may hold all of the mass up to rounding: a bucket below 1e-6 is noise of float32
    rest_p = np.maximum(1 - p.sum(axis=1), 1e-6)
    rest_q = np.maximum(1 - np.exp(log_q).sum(axis=1), 1e-6)
    return np.asarray((p * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q))


def _part(kept: Arrays, start: int, length: int) -> Arrays:
    if "top_tokens" not in kept:
        raise MeasureError("the reference kept no probabilities", "the reference must be evaluated without a reference")
    return {name: kept[name][start : start + length] for name in ("top_tokens", "top_log_probs")}


def _sums(samples: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    return np.bincount(samples, weights=values.astype(np.float64)).astype(np.float64)


def _other_tokens(reference: int, candidate: int) -> MeasureError:
    return MeasureError(
        f"the reference holds {reference} tokens where the candidate has {candidate}",
        "both must be evaluated on the same batches",
    )


def _spread(documents: Sequence[list[_Window]], max_tokens: int) -> list[_Window]:
    """Return windows of `max_tokens` scored tokens in all, taken from the documents in turns; the last one is cut."""
    taken: list[tuple[int, int, _Window]] = []
    left = max_tokens
    for turn in range(max(map(len, documents), default=0)):
        for document in documents:
            if turn < len(document) and left > 0:
                tokens = document[turn].tokens[: left + 1]
                taken.append((document[turn].sample, turn, _Window(tokens, document[turn].sample)))
                left -= len(tokens) - 1
    return [window for *_, window in sorted(taken, key=lambda found: found[:2])]
