"""Rows from every kind of file; each kind of damage is an error that names file and row."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gossamer.data import read_rows
from gossamer.errors import DataError

ROWS = [{"text": 'He said "no",\nthen left.', "label": "ham"}, {"text": "naïve 🙂", "label": "spam"}]


def picture(level: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), level).save(stream, "PNG")
    return stream.getvalue()


def write_csv(path: Path, delimiter: str) -> None:
    lines = [delimiter.join(["text", "label"])]
    lines += [delimiter.join(['"' + row["text"].replace('"', '""') + '"', row["label"]]) for row in ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mails{suffix}"
    if suffix in (".csv", ".tsv"):
        write_csv(path, "," if suffix == ".csv" else "\t")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    table = read_rows(path)
    assert table.rows == ROWS
    assert table.columns == ["text", "label"]
    assert table.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_rows(ROWS).rows == ROWS


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "mails.csv"
    write_csv(path, ",")
    table = read_rows(path)
    assert [table.place(0), table.place(1)] == [f"{path}, line 2", f"{path}, line 4"]  # the first row is two lines long
    lines = tmp_path / "mails.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_rows(lines).place(1) == f"{lines}, line 3"


def test_a_byte_order_mark_and_a_long_cell_are_read(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    path.write_bytes(b"\xef\xbb\xbftext\n" + b"x" * 300_000 + b"\n")
    assert len(read_rows(path).rows[0]["text"]) == 300_000


def test_memory_fingerprint_follows_content() -> None:
    assert read_rows(ROWS).fingerprint == read_rows([dict(row) for row in ROWS]).fingerprint
    assert read_rows(ROWS).fingerprint != read_rows(ROWS[::-1]).fingerprint
    assert read_rows(ROWS).fingerprint != read_rows([{**ROWS[0], "label": "spam"}, ROWS[1]]).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "is empty: 0 bytes"),
        ("a.csv", b"\n\n", "no header"),
        ("a.csv", b"text,label\n", "a header (text, label) and no rows"),
        ("a.csv", b"text,label\nhi,1\nhi,1,2\n", "line 3: 3 cells where the header has 2"),
        ("a.csv", b"text,label\nhi,1\nhi\n", "line 3: 1 cells where the header has 2"),
        ("a.csv", b'text,label\n"hi"x,1\n', "line 2"),
        ("a.csv", b'text,label\nhi,1\n"hi,1\n', "unexpected end of data"),
        ("a.csv", b"text,text\nhi,1\n", "names 'text' more than once"),
        ("a.csv", b"text\nab\xe9c\n", "byte 0xe9 at offset 7, line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "offset 27, line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a JSON list, not an object"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.json", b'{"text": "a"}', "holds one JSON object, not a list"),
        ("a.json", b'[{"text": "a"},\n{]', "line 2: not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2: a JSON number"),
        ("a.json", b"[]", "no rows"),
        ("a.xlsx", b"PK", "unknown extension '.xlsx'"),
        ("a.parquet", b"PAR1junk", "is not a whole parquet file (8 bytes)"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert says in error.value.message
    assert str(path) in error.value.message


def test_a_parquet_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 100), path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"not a whole parquet file \\({length} bytes\\)"):
            read_rows(path)
    damaged = bytearray(whole)
    damaged[4:40] = b"\xff" * 36  # the footer is whole, a page is not
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_rows(path)


def test_missing_file_and_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(DataError, match="holds no data"):
        read_rows(tmp_path)
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"is a folder with train\.csv"):
        read_rows(tmp_path)


def test_hub_id_offline_is_a_data_error() -> None:
    datasets_offline = datasets.config.HF_HUB_OFFLINE
    if not datasets_offline:
        pytest.skip("needs HF_HUB_OFFLINE=1: no test goes to the network")
    with pytest.raises(DataError, match="neither a file nor a folder here") as error:
        read_rows("nobody/nothing:train")
    assert "HF_HUB_OFFLINE" in error.value.hint


def test_class_folders(tmp_path: Path) -> None:
    for label, level in (("dog", 10), ("cat", 20)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(picture(level))
        (tmp_path / label / "notes.txt").write_text("no image")
    table = read_rows(tmp_path)
    assert table.rows == [
        {"image": tmp_path / "cat" / "1.png", "label": "cat"},
        {"image": tmp_path / "dog" / "1.png", "label": "dog"},
    ]
    before = table.fingerprint
    (tmp_path / "dog" / "1.png").write_bytes(picture(11))
    assert read_rows(tmp_path).fingerprint != before


def test_metadata_folder(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture())
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,label\n1.png,cat\n")
    assert read_rows(tmp_path).rows == [{"file_name": tmp_path / "1.png", "label": "cat"}]
    metadata.write_text("file_name,label\n1.png,cat\n2.png,cat\n")
    with pytest.raises(DataError, match=r"line 3: there is no file"):
        read_rows(tmp_path)
    metadata.write_text("file_name,label\n../../secret.png,cat\n")
    with pytest.raises(DataError, match=r"line 2: .* lies outside"):
        read_rows(tmp_path)
    metadata.write_text("name,label\n1.png,cat\n")
    with pytest.raises(DataError, match="has no column file_name, only name, label"):
        read_rows(tmp_path)


def test_saved_dataset_keeps_images_encoded_and_class_names(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = {"image": [{"bytes": picture(9), "path": None}], "label": [1]}
    dataset = datasets.Dataset.from_dict(cells, features=features)
    dataset.save_to_disk(str(tmp_path / "one"))
    table = read_rows(tmp_path / "one")
    assert table.rows == [{"image": {"bytes": picture(9), "path": None}, "label": 1}]
    assert table.class_names == {"label": ("cat", "dog")}
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="several splits: train, test"):
        read_rows(tmp_path / "two")
    assert read_rows(tmp_path / "two" / "test").rows == table.rows
    dataset.to_parquet(str(tmp_path / "pictures.parquet"))
    assert read_rows(tmp_path / "pictures.parquet").class_names == table.class_names
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"short")
    with pytest.raises(DataError, match="does not open"):
        read_rows(tmp_path / "one")


def test_memory_rows_that_are_not_mappings() -> None:
    with pytest.raises(DataError, match="row 2: a str, not a mapping"):
        read_rows([{"text": "a"}, "b"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no rows"):
        read_rows([])
