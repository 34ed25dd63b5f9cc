from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.errors import RunError
from gossamer.run.journal import Journal, read_journal


def test_entries_are_kept_in_order_over_openings(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for number in range(2):
        with Journal(path) as journal:
            journal.append("measured", number=number, text="é\n\u2028")
    entries = read_journal(path)
    assert [(entry["event"], entry["number"], entry["text"]) for entry in entries] == [
        ("measured", 0, "é\n\u2028"),
        ("measured", 1, "é\n\u2028"),
    ]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == entries


def test_a_line_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("first")
        whole = path.read_bytes()
        journal.append("second", text="é")
    both = path.read_bytes()
    for length in range(len(whole), len(both)):
        path.write_bytes(both[:length])
        assert [entry["event"] for entry in read_journal(path)] == ["first"]
        with Journal(path) as journal:
            journal.append("third")
        assert [entry["event"] for entry in read_journal(path)] == ["first", "third"]


def test_zeros_left_by_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("first")
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    with Journal(path) as journal:
        assert [entry["event"] for entry in journal.entries] == ["first"]


@pytest.mark.parametrize("damage", [b"not json\n", b"[1]\n", b"\n", b"\xff\xfe\n"])
def test_damage_in_the_middle_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event":"a"}\n' + damage + b'{"event":"b"}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        Journal(path)


def test_no_journal_is_no_entry(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "absent") == []
