"""Conversations reach the model through its own chat template, token for token as transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.errors import DataError
from gossamer.models.source import Source
from gossamer.tasks import get_task
from gossamer.tasks.chat import in_words, rendered, turns_of

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{{ ('[CLS] ' if message.role == 'user' else '[SEP] ') + message.content + ' ' }}{% endfor %}"
)
TURNS = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f g"}]
ROWS: list[dict[str, Any]] = [{"messages": TURNS}, {"prompt": "a b c", "completion": "d e f g"}]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, llama: Source) -> Source:
    """Give the tiny Llama a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    assert llama.path is not None
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(llama.path)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(**_small(llama))).save_pretrained(folder)
    return Source.open(folder)


def _small(source: Source) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "max_position_embeddings")  # fmt: skip
    return {name: getattr(source.config, name) for name in names}


@pytest.mark.parametrize("row", ROWS, ids=["messages", "prompt"])
def test_tokens_are_those_of_transformers(talker: Source, row: dict[str, Any]) -> None:
    assert talker.path is not None
    tokenizer = AutoTokenizer.from_pretrained(talker.path)
    expected = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    (batch,) = get_task("causal-lm", context=32).batches([row], talker)
    assert batch.inputs["input_ids"][0].tolist() == list(expected)
    assert 2 in expected  # [CLS] is one token, not letters


def test_a_model_without_a_template_reads_the_contents(llama: Source) -> None:
    for row in ROWS:
        found = rendered(row, 0, llama.processor())
        assert (found.text, found.form) == ("a b c\n\nd e f g", "joined")


def test_plain_text_stays_as_it_is(talker: Source) -> None:
    found = rendered({"text": "a b  c"}, 0, talker.processor())
    assert (found.text, found.form) == ("a b  c", "text")


def test_turns_that_the_template_refuses_are_named(talker: Source) -> None:
    row = {"messages": [{"role": "tool", "content": "a"}], "place": "chats.jsonl, line 4"}
    with pytest.raises(DataError, match=r"chats.jsonl, line 4: the model's chat template refuses the turns \(tool\)"):
        rendered(row, 0, talker.processor())


def test_a_template_cannot_reach_out_of_its_sandbox(talker: Source, tmp_path: Path) -> None:
    tokenizer = talker.processor()
    target = tmp_path / "written"
    tokenizer.chat_template = (
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    )
    with pytest.raises(DataError, match="refuses the turns"):
        rendered(ROWS[0], 0, tokenizer)
    assert not target.exists()


def test_a_prompt_may_be_turns_itself() -> None:
    assert turns_of({"prompt": TURNS[:1], "completion": "d e f g"}) == TURNS
    assert turns_of({"text": "x"}) is None


def test_what_was_done_is_said() -> None:
    assert in_words(["text", "text"], "m") == ""
    assert in_words(["template", "template", "text"], "m") == (
        "2 chats went through the chat template of m; 1 texts were read as they are"
    )
    assert in_words(["joined"], "m") == "1 chats were read as plain text: m has no chat template"


def test_rows_say_what_the_model_reads(talker: Source) -> None:
    task = get_task("causal-lm", context=4)
    rows = [*ROWS, {"text": "a b"}, {"text": [4, 5, 6]}]
    found = task.written(rows, talker)
    assert [(one.num_tokens, one.limit, one.form) for one in found] == [(9, 4, "template")] * 2 + [(2, 4, "text")]
    lengths = [sum(batch.inputs["input_ids"].size for batch in task.batches([row], talker)) for row in rows[:3]]
    np.testing.assert_array_equal(lengths, [8, 8, 2])  # a last window of one token has nothing to score
