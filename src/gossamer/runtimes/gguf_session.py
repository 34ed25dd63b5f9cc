"""A GGUF file opened in llama.cpp through its Python binding: the logits of every position of every row.

Weights are computed with as the file holds them; keys and values are kept in float32, and no layer goes to a graphics
card. llama.cpp's kernels for blocks round each layer's inputs to 8 bits, in blocks of 32 (256 for the K formats), on
their own: that is the runtime's arithmetic and no part of the file, so answers differ from the weights' own by about a
hundredth. Matrices in float32 are computed in float32.
"""

from __future__ import annotations

import importlib.util
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ArtifactError, MeasureError, RuntimeUnavailable
from gossamer.runtimes.base import Session
from gossamer.tasks.base import Arrays

FLOAT32 = 0  # ggml's number for float32
BATCH = 512  # tokens computed at a time
PACKAGE = "llama_cpp"


class LlamaSession(Session):
    """A loaded model, and a context that grows with the longest row seen."""

    def __init__(self, path: Path, threads: int, output: str = "logits") -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise RuntimeUnavailable(
                "opening GGUF files needs llama.cpp's Python binding (llama-cpp-python), which is not installed",
                'pip install "gossamer[gguf]" (it compiles llama.cpp: a C++ compiler and cmake are needed)',
            )
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self._library: Any = llama_cpp
        self._threads, self._output = threads, output
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ArtifactError(f"llama.cpp does not open {path}", "write the artifact again")
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        self._num_tokens = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self._context: Any = None
        self._free_context: Any = None
        self._capacity = 0

    def run(self, inputs: Arrays) -> Arrays:
        """Return the logits [B, T, V] of `input_ids` [B, T]; positions that `attention_mask` hides are zero."""
        ids = np.asarray(inputs["input_ids"])
        kept = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
        largest = int(ids.max(initial=0))
        if largest >= self._num_tokens or int(ids.min(initial=0)) < 0:
            raise MeasureError(
                f"a token id is {largest}; the file has {self._num_tokens} tokens", "use the model's own tokenizer"
            )
        logits = np.zeros((*ids.shape, self._num_tokens), np.float32)
        self._grow(int(kept.sum(1).max(initial=1)))
        for row, (tokens, shown) in enumerate(zip(ids, kept, strict=True)):
            logits[row, shown] = self._row(tokens[shown])
        return {self._output: logits}

    def _grow(self, num_tokens: int) -> None:
        if num_tokens <= self._capacity:
            return
        library = self._library
        self._capacity = -(-num_tokens // BATCH) * BATCH
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self._capacity, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.type_k = settings.type_v = FLOAT32
        settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._free_context is not None:
            self._free_context()
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise MeasureError(f"llama.cpp makes no context of {self._capacity} tokens", "use a shorter context")
        self._free_context = weakref.finalize(self, library.llama_free, self._context)

    def _row(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits [T, V] of one sequence, starting from an empty memory."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(BATCH, 0, 1)
        parts = [np.zeros((0, self._num_tokens), np.float32)]
        try:
            for start in range(0, len(tokens), BATCH):
                chunk = tokens[start : start + BATCH]
                batch.n_tokens = len(chunk)
                for place, token in enumerate(chunk.tolist()):
                    batch.token[place], batch.pos[place] = token, start + place
                    batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
                if status := library.llama_decode(self._context, batch):
                    raise MeasureError(f"llama.cpp stopped with status {status} after {start} tokens")
                found = library.llama_get_logits(self._context)
                parts.append(np.ctypeslib.as_array(found, (len(chunk), self._num_tokens)).copy())
        finally:
            library.llama_batch_free(batch)
        return np.concatenate(parts)
