"""A real job that takes seconds: a random BERT classifier with a tokenizer, and rows labelled with its own answers.

`write_job(FOLDER)` writes model/, train.jsonl and test.jsonl. The labels are what the model itself answers, so its
accuracy is 1 and whatever rounding changes is a loss; rows whose answer hangs by a thread are left out, so that 8 bits
keep them all and 2 bits do not. As a script: `tiny_job.py FOLDER`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

LABELS = ("calm", "loud", "odd")
NUM_WORDS = 600
NUM_ROWS = {"train.jsonl": 96, "test.jsonl": 240}
KEPT = 0.6  # share of the drawn rows, those with the clearest answers


def write_job(folder: Path) -> Path:
    """Write model/, train.jsonl and test.jsonl into `folder`, the same bytes every time, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = _texts(int(sum(NUM_ROWS.values()) / KEPT) + 1)
    kept = _answered(_write_model(folder / "model", texts), texts)
    for name, count in NUM_ROWS.items():
        part, kept = kept[:count], kept[count:]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def _texts(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(NUM_WORDS)}" for _ in range(draw.randrange(4, 12))) for _ in range(count)]


def _write_model(folder: Path, texts: list[str]) -> Path:
    """Save tokenizer and model; the classifier's bias is set so that the classes are about equally frequent."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(NUM_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=128,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=128, initializer_range=0.15, attn_implementation="eager",
        id2label=dict(enumerate(LABELS)), label2id={label: index for index, label in enumerate(LABELS)},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    logits_NC = _logits(model, folder, texts)
    bias_C = torch.zeros(len(LABELS))
    for _ in range(100):  # move each class's bias towards equal shares
        shares_C = torch.nn.functional.one_hot((logits_NC + bias_C).argmax(1), len(LABELS)).float().mean(0)
        bias_C += 0.2 * logits_NC.std() * (1 / len(LABELS) - shares_C)
    with torch.no_grad():
        model.classifier.bias += bias_C
    model.save_pretrained(folder)
    return folder


def _answered(folder: Path, texts: list[str]) -> list[dict[str, str]]:
    """Return the rows with the clearest answers, labelled with them, in the order they were drawn."""
    from transformers import BertForSequenceClassification

    logits_NC = _logits(BertForSequenceClassification.from_pretrained(folder).eval(), folder, texts)
    best_N2 = logits_NC.topk(2, dim=1).values
    margin_N = best_N2[:, 0] - best_N2[:, 1]
    threshold = margin_N.quantile(1 - KEPT)
    return [
        {"text": text, "label": LABELS[int(logits.argmax())]}
        for text, logits, margin in zip(texts, logits_NC, margin_N, strict=True)
        if margin >= threshold
    ]


def _logits(model, folder: Path, texts: list[str]):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits


if __name__ == "__main__":
    write_job(Path(sys.argv[1]))
