"""Carry out a recipe on a tiny Llama, alone or in several processes: `shared_sweep.py FOLDER [WORD]`.

Each process writes what came of it to FOLDER/found-RANK.safetensors. With the word `fail` the last process fails in the
third block of the first sweep; with `experts` it is a tiny Mixtral, some experts of which see too few tokens, and what
they saw is written to FOLDER/routed-RANK.json; with `gpu` each process computes on a GPU that is pretended.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gossamer.models.candidate import Candidate
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.run.team import assembled
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques import routing
from gossamer.techniques.base import Context
from gossamer.techniques.block import Block
from gossamer.techniques.prune.sparsify import Sparsify
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.scaled import Awq, Smooth
from gossamer.techniques.quantize.tune_scales import TuneScales

TASK = get_task("causal-lm")
STEPS = (Sparsify(sparsity=0.3), Smooth(), Gptq(bits=4, group_size=16, ignore=("re:.*(k_proj|up_proj)",)),
         Awq(bits=3, group_size=16, targets=("k", "up"), exponents=4), TuneScales(epochs=2))  # fmt: skip
OF_EXPERTS = (Gptq(bits=4, group_size=16, symmetric=True),)
TOKENS_PER_INPUT = 4.0


class Failing(Sparsify):
    """Sparsify, in the eyes of the run, that stops in one block."""

    def entry(self) -> dict[str, Any]:
        """Return what the step is called when it does not stop."""
        return Sparsify(sparsity=0.3).entry()

    def solve(self, block: Block) -> None:
        """Stop where it was told to."""
        if block.name == "model.layers.2" and block.team.rank == block.team.size - 1:
            sys.exit(3)
        super().solve(block)


def llama() -> PreTrainedModel:
    """Return a tiny Llama of three blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    found: PreTrainedModel = LlamaForCausalLM(config).eval()
    return found


def mixtral() -> PreTrainedModel:
    """Return a tiny model with experts, of which an unusual number of tokens is asked."""
    routing.TOKENS_PER_INPUT = TOKENS_PER_INPUT
    path = Path(__file__).parents[1] / "models" / "tiny_experts.py"
    found: PreTrainedModel = runpy.run_path(str(path))["mixtral"]()
    return found


@contextmanager
def pretended(wanted: bool) -> Iterator[torch.device]:
    """Yield the CPU, or a GPU that is pretended while the `with` lasts."""
    if not wanted:
        yield torch.device("cpu")
        return
    script = runpy.run_path(str(Path(__file__).parent / "pretended_gpu.py"))
    with script["pretended"]():
        yield script["GPU"]


def main(folder: Path, word: str = "") -> None:
    """Carry out the steps on 21 samples (two in each chunk but the last: an odd number of chunks)."""
    torch.set_num_threads(1)
    forward = lambda module, inputs: module(**inputs).logits  # noqa: E731
    source = Source.open(mixtral() if word == "experts" else llama(), forward=forward)
    draw = np.random.default_rng(0)
    batches = [Batch({"input_ids": draw.integers(1, 64, (1, 12))}, np.array([index])) for index in range(21)]
    candidate = Candidate(source=source, module=source.module(TASK))
    model = map_model(candidate.module, {"input_ids": torch.from_numpy(batches[0].inputs["input_ids"])}, forward)
    with assembled() as team, pretended(word == "gpu") as device:
        context = Context(task=TASK, example=batches[0].inputs, calibration=batches, progress=Silent(), team=team,
                          identity={"of": "test"}, device=device)  # fmt: skip
        steps = {"fail": (Failing(sparsity=0.3), *STEPS[1:]), "experts": OF_EXPERTS, "gpu": STEPS[:-1]}.get(word, STEPS)
        if team.leads:
            with Run(folder / "run", {"verb": "test"}) as run:
                for step in steps:
                    candidate = step.apply(candidate, model, replace(context, run=run))
        else:
            for step in steps:
                candidate = step.apply(candidate, model, context)
        found = {name: values.detach() for name, values in candidate.module.named_parameters()}
        found |= {f"{name}.codes": codes.codes for name, codes in candidate.quantized.items()}
        save_file(found, folder / f"found-{team.rank}.safetensors")
        if word == "experts":
            (folder / f"routed-{team.rank}.json").write_text(json.dumps(candidate.routed), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
