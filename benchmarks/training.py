"""The training loop beside plain transformers.Trainer, steps in bf16 beside fp32, and what LoRA leaves of the memory.

    python benchmarks/training.py --model DIR --data train.jsonl --eval test.jsonl [--task causal-lm] [--tokens 128]

**Loop**: both fine-tune all weights of the same model on the same full rows in the same order, from the same seed, with
the rate, warm-up, clipping, judging (before, four times, after) and checkpoints alike, in turns. The losses on the rows
held back say whether it was the same work. **Precision**: a model without its later half of blocks is trained in both,
in turns, with several seeds. **Passes**: blocks passed again on the way back, compiled, and where torchao is installed
moments in 8 bits (FP8 on a GPU that multiplies it), in turns. **Memory**: the peak of a process that trains thin layers
(`lora`), and of those that train everything.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contest import Contest, build_all, calibration_inputs, make_contest, megabytes, say
from encoder import parsed
from ours import Gossamer
from results import table, write_section
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from gossamer.models.blocks import find_stacks
from gossamer.models.config import quiet_transformers
from gossamer.tasks.base import Batch, spread
from gossamer.train.lesson import Lesson, Plan, Precision
from gossamer.train.loop import train
from gossamer.train.objectives import Labels
from gossamer.train.passes import FP8_FROM

PARTS = ("loop", "precision", "passes", "memory")
JUDGED = 64
RATE, WARMUP = 2e-5, 0.06
PLAIN, OURS = "transformers.Trainer", "**gossamer**"


@dataclass
class Steps:
    """Note when steps end: the progress of our loop, and what a plain Trainer's callback tells."""

    ends: list[float] = field(default_factory=list)

    def say(self, message: str) -> None:
        """Say nothing."""

    def record(self, series: str, step: int, values: Mapping[str, float | str]) -> None:
        """Record nothing."""

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Give what notes the end of a step."""

        def advance(units: float) -> None:
            if units and label.endswith("steps"):
                self.ends.append(time.perf_counter())

        yield advance

    @property
    def seconds(self) -> float:
        """Return the median time from the end of one step to the next: judging and saving lie outside the median."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


@dataclass(frozen=True)
class Trained:
    """Hold what one training took: seconds of a step and of the whole call, the losses on the rows held back."""

    step: float
    whole: float
    before: float
    after: float


@dataclass(frozen=True)
class Work:
    """Hold what is trained on what."""

    contest: Contest
    learned: Sequence[Batch]
    judged: Sequence[Batch]
    batch_size: int

    def module(self, shallow: bool = False) -> nn.Module:
        """Return the model anew, without dropout; `shallow`: without the later half of its blocks."""
        prepared = self.contest.prepared
        module = prepared.source.module(prepared.task)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        for stack in find_stacks(module)[0] if shallow else ():
            blocks = module.get_submodule(stack.name)
            assert isinstance(blocks, nn.ModuleList)
            del blocks[stack.num_blocks // 2 :]
        return module

    def ours(self, precision: Precision, seed: int = 0, shallow: bool = False, **passes: Any) -> Trained:
        """Train with our loop on the rows' labels; `passes` are settings of the plan."""
        prepared, steps = self.contest.prepared, Steps()
        task, source = prepared.task, prepared.source

        def loss(outputs: Tensor, row: Batch) -> Tensor:
            return task.loss({task.output: outputs}, row)

        lesson = Lesson(
            student=self.module(shallow),
            forward=lambda module, inputs: source.forward(module, inputs, task.output),
            objectives=[(1.0, Labels(loss))],
            learned=self.learned,
            judged=self.judged,
        )
        plan = Plan(1, self.batch_size, RATE, precision, self.batch_size, warmup=WARMUP, frozen=(), seed=seed, **passes)
        began = time.perf_counter()
        with TemporaryDirectory() as folder:
            outcome = train(lesson, plan, Path(folder) / "checkpoints", steps, label="training")
        return Trained(steps.seconds, time.perf_counter() - began, outcome.before, outcome.after)

    def plain(self, precision: Precision) -> Trained:
        """Train with transformers' own loop and the model's own loss."""
        steps, count = Steps(), len(self.learned) // self.batch_size

        class Noted(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                steps.ends.append(time.perf_counter())

        began = time.perf_counter()
        with TemporaryDirectory() as folder, quiet_transformers():
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=self.batch_size,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                warmup_steps=-(-count * 6 // 100),
                weight_decay=0.0,
                bf16=precision == "bf16",
                use_cpu=not torch.cuda.is_available(),
                eval_strategy="steps",
                eval_steps=-(-count // 4),
                save_strategy="steps",
                save_steps=-(-count // 4),
                save_total_limit=2,
                load_best_model_at_end=True,
                logging_steps=1,
                disable_tqdm=True,
                report_to=[],
                dataloader_pin_memory=False,
                seed=0,
            )
            rows = [list(map(self._as_dict, some)) for some in (self.learned, self.judged)]
            trainer = Trainer(
                model=self.module(), args=arguments, train_dataset=rows[0], eval_dataset=rows[1], callbacks=[Noted()]
            )
            trainer.remove_callback(PrinterCallback)
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            after = trainer.evaluate()["eval_loss"]
        return Trained(steps.seconds, time.perf_counter() - began, before, after)

    def _as_dict(self, row: Batch) -> dict[str, Tensor]:
        inputs = {name: torch.from_numpy(values[0]) for name, values in row.inputs.items()}
        targets = next(iter(row.targets.values()), None)
        labels = inputs["input_ids"] if targets is None else torch.as_tensor(targets).flatten()[0]
        return {**inputs, "labels": labels}


def in_turns(rounds: int, ways: Mapping[str, Callable[[int], Trained]]) -> dict[str, list[Trained]]:
    """Train in every way in turns, so that what the machine does besides falls on all alike; the round is the seed."""
    found: dict[str, list[Trained]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            one = way(number)
            found[name].append(one)
            say(
                f"{name}, {number + 1} of {rounds}: {1e3 * one.step:.0f} ms a step, {one.before:.4g} to {one.after:.4g}"
            )
            gc.collect()
    return found


def ratio(found: Sequence[Trained], base: Sequence[Trained], what: str) -> str:
    """Return how long `found` took of `base`, round by round: the median, the least and the most."""
    shares = [100 * getattr(a, what) / getattr(b, what) for a, b in zip(found, base, strict=True)]
    return f"{statistics.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})"


def named_loss(values: Sequence[float]) -> str:
    """Return the least and the most of some losses."""
    return f"{min(values):.4f} to {max(values):.4f}"


def of_loop(work: Work, rounds: int, precision: Precision) -> str:
    """Return the table of our loop beside the plain one."""
    found = in_turns(rounds, {PLAIN: lambda _: work.plain(precision), OURS: lambda _: work.ours(precision)})
    base = found[PLAIN]
    rows = [
        [
            name, f"{1e3 * statistics.median(one.step for one in some):.0f}", ratio(some, base, "step"),
            ratio(some, base, "whole"), f"{some[0].before:.5f}", f"{some[0].after:.5f}",
        ]
        for name, some in found.items()
    ]  # fmt: skip
    count = len(work.learned) // work.batch_size
    title = f"All weights fine-tuned in {precision}, {count} steps of {work.batch_size} rows, {rounds} times in turns:"
    return f"{title}\n\n" + table(
        ("", "ms a step", "of the plain loop's", "whole call, of the plain one's", "loss before", "loss after"), rows
    )


def of_precision(work: Work, rounds: int) -> str:
    """Return the table of bf16 beside fp32."""
    found = in_turns(
        rounds,
        {name: lambda seed, name=name: work.ours(name, seed, shallow=True) for name in ("fp32", "bf16")},  # type: ignore[misc]
    )
    losses = {name: [one.after for one in some] for name, some in found.items()}
    rows = [
        [
            name, f"{1e3 * statistics.median(one.step for one in some):.0f}", ratio(some, found["fp32"], "step"),
            f"{some[0].before:.4f}", f"{statistics.mean(losses[name]):.4f}",
            named_loss(losses[name]),
        ]
        for name, some in found.items()
    ]  # fmt: skip
    inside = min(losses["fp32"]) <= statistics.mean(losses["bf16"]) <= max(losses["fp32"])
    verdict = "lies" if inside else "does not lie"
    return (
        f"The first half of the blocks, trained with {rounds} seeds in turns:\n\n"
        + table(("", "ms a step", "of fp32's", "loss before", "loss after, mean", "of the seeds"), rows)
        + f"\n\nThe mean loss of bf16 {verdict} within the spread of fp32's seeds."
    )


def of_passes(work: Work, rounds: int, precision: Precision) -> str:
    """Return the table of the ways in which passes and steps are computed."""
    ways: dict[str, dict[str, Any]] = {
        "as ever": {}, "blocks passed again (`checkpointing`)": {"checkpointing": True},
        "blocks compiled (`compiled`)": {"compiled": True},
        "both": {"checkpointing": True, "compiled": True},
    }  # fmt: skip
    if find_spec("torchao") is not None:
        ways["moments in 8 bits (`adamw_8bit`)"] = {"optimizer": "adamw_8bit"}
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_FROM:
            ways["`precision: fp8`"] = {"precision": "fp8"}
            ways["`precision: fp8`, compiled"] = {"precision": "fp8", "compiled": True}

    def way(settings: dict[str, Any]) -> Callable[[int], Trained]:
        return lambda _: work.ours(**{"precision": precision, **settings})

    found = in_turns(rounds, {name: way(settings) for name, settings in ways.items()})
    base = found["as ever"]
    tokens = work.batch_size * next(iter(work.learned[0].inputs.values())).size
    rows = [
        [
            name, f"{1e3 * statistics.median(one.step for one in some):.0f}", ratio(some, base, "step"),
            ratio(some, base, "whole"), f"{tokens / statistics.median(one.step for one in some):.0f}",
            f"{some[0].after:.5f}",
        ]
        for name, some in found.items()
    ]  # fmt: skip
    return f"How passes are computed, all weights in {precision}, {rounds} times in turns:\n\n" + table(
        ("", "ms a step", "of the first's", "whole call, of the first's", "tokens a second", "loss after"), rows
    )


def of_memory(contest: Contest, arguments: argparse.Namespace, rows: int, batch_size: int) -> str:
    """Return the table of what a process holds that trains everything, in several ways, or thin layers."""
    taught = {"rows": rows, "epochs": 1, "batch_size": batch_size, "logits": 0, "hidden": 0, "labels": 1}

    def trained(label: str, at_once: int, step: str = "distill", **settings: Any) -> Gossamer:
        settings |= {"embeddings": True} if step == "distill" else {}
        entry = {step: {**taught, "micro_batch": at_once, **settings}}
        return Gossamer("torch", (entry,), f"{label}, {at_once} at a time")

    peers = [
        trained("all weights", 1),
        trained("LoRA, rank 16", 1, "lora", rank=16),
        trained("all weights", batch_size),
        trained("all weights, blocks passed again", batch_size, checkpointing=True),
    ]
    if find_spec("torchao") is not None:
        peers.insert(1, trained("all weights, moments in 8 bits", 1, optimizer="adamw_8bit"))
    entries, skipped = build_all(contest, peers, arguments, calibration_inputs(contest, arguments.calibration_rows))
    whole = entries[0].built.peak_bytes
    found = [
        [one.label, megabytes(made.peak_bytes, 0), f"{made.peak_bytes / whole:.1%}", f"{made.seconds:.0f}"]
        for one, made in ((entry.peer, entry.built) for entry in entries)
    ]
    return (
        f"Peak memory of a process that trains on {rows} rows:\n\n"
        + table(("", "peak MB", "of all weights'", "made in s"), found)
        + "".join(f"\n\n{line}" for line in skipped)
    )


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark asks."""
    parser.add_argument("--task", default="text-classification", choices=("text-classification", "causal-lm"))
    parser.add_argument("--steps", type=int, default=40, help="of the loops in turns")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is trained, in turns")
    parser.add_argument("--seeds", type=int, default=3, help="trainings in each precision")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which of the tables")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="of the loops")


def main() -> int:
    """Run the benchmark."""
    arguments = parsed(__doc__, add_own)
    began = time.monotonic()
    tokens, size = arguments.tokens, arguments.batch_size
    settings = (
        {"context": tokens} if arguments.task == "causal-lm" else {"max_length": tokens, "latency_tokens": tokens}
    )
    contest = make_contest(arguments, arguments.task, settings, arguments.rows)
    prepared = contest.prepared
    torch.set_num_threads(contest.threads)
    wanted = size * arguments.steps + JUDGED
    full = [
        row
        for row in prepared.task.batches(prepared.others, prepared.source, batch_size=1)
        if next(iter(row.inputs.values())).shape[1] == tokens
    ]
    if len(full) < wanted:
        print(f"training.py: {len(full)} rows of {tokens} tokens, {wanted} are needed", file=sys.stderr)
        return 1
    rows = spread(full, wanted)
    work = Work(contest, rows[JUDGED:], rows[:JUDGED], size)
    parts = {
        "loop": lambda: of_loop(work, arguments.rounds, arguments.precision),
        "precision": lambda: of_precision(work, arguments.seeds),
        "passes": lambda: of_passes(work, arguments.rounds, arguments.precision),
        "memory": lambda: of_memory(contest, arguments, 4 * size * 4, size),
    }
    asked = [name for name in PARTS if name in arguments.parts]
    text = "\n\n".join(parts[name]() for name in asked)
    print(text)
    if not arguments.no_results:
        name = arguments.model.name
        part = "" if asked == list(PARTS) else f", {' and '.join(asked)}"
        write_section(
            f"training {name}{part}",
            f"Training {name}{part}",
            text,
            threads=contest.threads,
            seconds=time.monotonic() - began,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
