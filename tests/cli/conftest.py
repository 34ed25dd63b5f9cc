"""What the command line's tests share: the run that the report's tests draw, and a tiny model folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.plan.records import RunResult


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    """Give tests the run of tests/report/conftest.py."""
    path = Path(__file__).parent.parent / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("a_run_to_draw", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.a_run  # type: ignore[no-any-return]


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """Write a random BERT classifier of two layers, 32 wide, as a Hugging Face folder."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1},
    )  # fmt: skip
    folder = tmp_path / "tiny"
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def wide_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print as into a pipe: pytest-xdist sets COLUMNS for its workers, which would narrow every table."""
    monkeypatch.delenv("COLUMNS", raising=False)
