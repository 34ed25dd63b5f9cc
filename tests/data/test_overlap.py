"""Shared passages are found wherever they stand, as a slow search of all word windows finds them."""

from __future__ import annotations

import random

import pytest

from gossamer.data.overlap import SHINGLE, Passages, said, words_of


def prose(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(400)}" for _ in range(count)]


def slow(text: str, judging: list[str]) -> bool:
    """Compare every window of SHINGLE words with every other."""
    windows = {
        tuple(words[i : i + SHINGLE]) for words in map(words_of, judging) for i in range(len(words) - SHINGLE + 1)
    }
    words = words_of(text)
    return any(tuple(words[i : i + SHINGLE]) in windows for i in range(len(words) - SHINGLE + 1))


@pytest.mark.parametrize("shared", [0, SHINGLE - 1, SHINGLE, 3 * SHINGLE])
@pytest.mark.parametrize("at", [0, 17, 140])
def test_a_passage_is_found_from_the_length_of_a_shingle_on(shared: int, at: int) -> None:
    document, passage = prose(1, 300), prose(2, 400)[100 : 100 + shared]
    text = " ".join([*document[:at], *passage, *document[at:]])
    judging = [" ".join(prose(2, 400)), " ".join(prose(3, 200))]
    assert Passages(judging).stand_in(text) is slow(text, judging) is (shared >= SHINGLE)


def test_case_punctuation_and_white_space_do_not_hide_it() -> None:
    words = prose(4, 80)
    disguised = ",\n ".join(word.upper() for word in words)
    assert Passages([" ".join(words)]).stand_in(f"A preface. {disguised}!")


def test_words_in_another_order_are_no_passage() -> None:
    words = prose(5, 200)
    assert not Passages([" ".join(words)]).stand_in(" ".join(reversed(words)))


def test_each_ideograph_is_a_word() -> None:
    sentence = "".join(chr(0x4E00 + 7 * number) for number in range(120))
    assert len(words_of(sentence)) == 120
    assert Passages([sentence]).stand_in(f"前言。{sentence[30:90]}。后记")
    assert not Passages([sentence]).stand_in(sentence[: SHINGLE - 1])


def test_boilerplate_is_no_leak() -> None:
    footer = " ".join(prose(6, 70))
    judging = [f"{' '.join(prose(10 + number, 60))} {footer}" for number in range(8)]
    mail = f"{' '.join(prose(99, 60))} {footer}"
    assert slow(mail, judging)
    assert not Passages(judging).stand_in(mail)
    assert Passages(judging).stand_in(" ".join(prose(12, 60)))  # what one of them alone says is a leak still


def test_what_a_row_says_leaves_label_place_and_roles_out() -> None:
    turns = [{"role": "user", "content": "how much"}, {"role": "assistant", "content": "nothing"}]
    row = {"messages": turns, "label": "calm", "place": "rows.jsonl, line 3"}
    assert said(row).split() == ["how", "much", "nothing"]
    assert said({"image": b"\x00\x01", "place": "a"}) == ""
    assert not Passages([""]).stand_in("")
