"""Rows in: csv, tsv, jsonl, parquet, folders of images, Hugging Face datasets; columns by role; disjoint splits."""

from gossamer.data.columns import bind_columns, choose_columns, is_token_ids
from gossamer.data.rows import read_rows
from gossamer.data.splits import Splits, loose_key, row_key, split_rows, without_overlap
from gossamer.data.table import PLACE, Row, Table, place_of

__all__ = [
    "PLACE",
    "Row",
    "Splits",
    "Table",
    "bind_columns",
    "choose_columns",
    "is_token_ids",
    "loose_key",
    "place_of",
    "read_rows",
    "row_key",
    "split_rows",
    "without_overlap",
]
