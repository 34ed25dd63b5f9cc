"""Checks on calibration rows: silent on real rows, and each mistake that is put in is found.

The good rows are passages of speeches (examples/era), the foreign ones articles of the Universal Declaration of Human
Rights; the tokenizer is a byte-pair encoding learned from English, as a model's is learned from what it was trained on.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gossamer.data.checks import Text, check_texts, foreign_rows, is_constant, scripts
from gossamer.errors import DataError

LIMIT = 64


def as_rows(text: str) -> list[str]:
    """Return the paragraphs of a text, each on one line."""
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]


GERMAN = as_rows("""
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und
sollen einander im Geist der Brüderlichkeit begegnen. Jeder hat Anspruch auf die in dieser Erklärung verkündeten
Rechte und Freiheiten ohne irgendeinen Unterschied, etwa nach Rasse, Hautfarbe, Geschlecht, Sprache, Religion.

Jeder hat das Recht auf Arbeit, auf freie Berufswahl, auf gerechte und befriedigende Arbeitsbedingungen sowie
auf Schutz vor Arbeitslosigkeit. Jeder, ohne Unterschied, hat das Recht auf gleichen Lohn für gleiche Arbeit.
Jeder, der arbeitet, hat das Recht auf gerechte und befriedigende Entlohnung, die ihm und seiner Familie eine
Existenz sichert.
""")
FRENCH = as_rows("""
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de
conscience et doivent agir les uns envers les autres dans un esprit de fraternité. Chacun peut se prévaloir de
tous les droits et de toutes les libertés proclamés dans la présente Déclaration, sans distinction aucune,
notamment de race.
""")
RUSSIAN = as_rows("""
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны
поступать в отношении друг друга в духе братства. Каждый человек должен обладать всеми правами и всеми
свободами, провозглашенными настоящей Декларацией, без какого бы то ни было различия, как-то в отношении расы,
цвета кожи.
""")
CHINESE = as_rows("""
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。人人有资格享有本宣言所载的一切权利和自由。

人人有权工作、自由选择职业、享受公正和合适的工作条件并享受免于失业的保障。人人有同工同酬的权利，不受任何歧视。

人人有受教育的权利，教育应当免费，至少在初级和基本阶段应如此。初级教育应属义务性质。技术和职业教育应普遍设立。
""")
ENGLISH = as_rows("""
All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and
should act towards one another in a spirit of brotherhood. Everyone is entitled to all the rights and freedoms
set forth in this Declaration, without distinction of any kind, such as race, colour, sex, language, religion or
other opinion.
""")


@pytest.fixture(scope="module")
def english() -> list[str]:
    """Give passages of speeches, in an order of no meaning."""
    lines = (Path(__file__).parents[2] / "examples" / "era" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(found)
    return found[:240]


@pytest.fixture(scope="module")
def written(english: list[str]) -> Callable[..., list[Text]]:
    """Give what makes rows of texts, with a tokenizer that was learned from English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(english, trainer)

    def make(texts: list[str], *, fills: bool = True, limit: int = LIMIT) -> list[Text]:
        counts = [len(tokenizer.encode(text).ids) for text in texts]
        return [Text(t, n, limit, f"row {i + 1}", fills) for i, (t, n) in enumerate(zip(texts, counts, strict=True))]

    return make


def kinds(rows: list[Text], judging: list[Text]) -> dict[str, list[str]]:
    used = sum(min(row.num_tokens, row.limit) for row in rows)
    return {found.kind: list(found.first) for found in check_texts(rows, judging, used)}


def test_good_rows_are_told_nothing_but_what_does_not_fit(
    english: list[str], written: Callable[..., list[Text]]
) -> None:
    half = len(english) // 2
    rows, judging = written(english[:half]), written(english[half:])
    assert set(kinds(rows, judging)) <= {"truncated"}
    assert not any(foreign_rows(judging, rows))
    assert not any(foreign_rows(written(ENGLISH), judging))  # of another field and another century, but English


@pytest.mark.parametrize("strangers", [GERMAN, FRENCH, RUSSIAN], ids=["german", "french", "russian"])
def test_rows_of_another_language_are_found_among_english_ones(
    english: list[str], written: Callable[..., list[Text]], strangers: list[str]
) -> None:
    texts = [*english[:20], *strangers, *english[20:40]]
    found = foreign_rows(written(texts), written(english[40:]))
    assert [index for index, foreign in enumerate(found) if foreign] == list(range(20, 20 + len(strangers)))


def test_chinese_rows_are_found_among_english_ones_and_the_other_way_round(
    english: list[str], written: Callable[..., list[Text]]
) -> None:
    mixed = written([*english[:10], *CHINESE])
    says = next(found for found in check_texts(mixed, written(english[40:]), 10_000) if found.kind == "language")
    assert (says.count, says.of, says.first[0]) == (len(CHINESE), len(mixed), "row 11")
    assert says.says.startswith(f"{len(CHINESE)} of {len(mixed)} calibration rows are in another script or language")
    turned = foreign_rows(written([*CHINESE, *english[:3]]), written(CHINESE))
    assert turned == [False] * len(CHINESE) + [True] * 3


def test_rows_that_judge_in_two_languages_make_neither_foreign(
    english: list[str], written: Callable[..., list[Text]]
) -> None:
    judging = written([*english[40:80], *RUSSIAN * 6])
    assert not any(foreign_rows(written([*english[:20], *RUSSIAN]), judging))


def test_duplicates_are_found_but_for_case_and_white_space(
    english: list[str], written: Callable[..., list[Text]]
) -> None:
    texts = [*english[:5], english[1].upper().replace(" ", "\n "), english[3]]
    assert kinds(written(texts), written(english[40:]))["duplicates"] == ["row 6", "row 7"]


def test_text_that_repeats_itself_is_found(english: list[str], written: Callable[..., list[Text]]) -> None:
    draw = random.Random(1)
    noise = "".join(draw.choice(string.ascii_letters + " ") for _ in range(3000))
    line = "Please do not reply to this message.\n"
    assert [is_constant(text) for text in ("a" * 1000, line * 100, noise, " ".join(english), "a" * 100)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    rows, judging = written([*english[:5], line * 100]), written(english[40:])
    assert kinds(rows, judging)["constant"] == ["row 6"]
    with pytest.raises(DataError, match="all 2 calibration rows repeat themselves"):
        check_texts(written(["b" * 900, line * 50]), judging, 100)


def test_what_does_not_fit_is_counted_in_tokens(english: list[str], written: Callable[..., list[Text]]) -> None:
    rows = [Text("a b c", count, 10, f"row {count}", True) for count in (4, 10, 11, 75)]
    (found,) = [one for one in check_texts(rows, rows, 34) if one.kind == "truncated"]
    assert (found.level, found.count, found.first) == ("note", 2, ("row 11", "row 75"))
    assert "longer than the 10 tokens that fit; 66% of all tokens are not used" in found.says


def test_short_rows_are_told_where_inputs_are_meant_to_be_full(
    english: list[str], written: Callable[..., list[Text]]
) -> None:
    short = [text[:30] for text in english[:12]]
    judging = written(english[40:])
    assert kinds(written(short, limit=512), judging)["short"] == ["row 1", "row 2", "row 3"]
    assert "short" not in kinds(written(short, limit=512, fills=False), judging)  # sentences of a classifier
    assert "short" not in kinds(written(short, limit=16), judging)


def test_letters_are_counted_by_script() -> None:
    assert scripts("Grüße, Мир 42 世界 カタカナ!") == {"LATIN": 5, "CYRILLIC": 3, "CJK": 6}
    assert not scripts("3.14 %")
