"""A Hugging Face tokenizer as the arrays of a GGUF file: tokens, merges or scores, kinds, special ids.

llama.cpp has its own tokenizers and takes from the file which one, and its tables. Two kinds of tokenizer.json are
written; others are refused, since a file that cuts text differently is a worse model that looks like the same:

    gpt2     BPE over bytes: tokens and merges as they are, and the name of the rule that cuts text into words first
             (`pre`), known here by the regular expression in the tokenizer's own pre_tokenizer
    llama    BPE with byte fallback, SentencePiece's: llama.cpp joins the neighbours whose token scores highest, so a
             token's score is minus the place of the merge that makes it, and tokens no merge makes come last

A folder without a tokenizer (token ids are the data then) gives the model `none`, which llama.cpp opens too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import ModelError, RuntimeUnavailable
from gossamer.models.source import Source

# kinds of tokens in the file
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_RULES = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL: "qwen2",
}
REMEDY = "use the runtime onnxruntime, openvino or torch, which keep the tokenizer's own files"


@dataclass(frozen=True)
class Vocabulary:
    """Hold what the file says of the tokenizer; `model` is `gpt2`, `llama` or `none`."""

    model: str
    pre: str | None = None
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)  # bos, eos, unk, pad
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None

    def write(self, writer: Any) -> None:
        """Add the keys to a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        for name, token in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(source: Source, num_rows: int) -> Vocabulary:
    """Return the tokenizer of a model whose embedding has `num_rows` rows.

    Raises RuntimeUnavailable for a tokenizer that llama.cpp would not follow, ModelError when it has more tokens than
    the embedding has rows.
    """
    if source.path is None or not _has_tokenizer(source):
        return Vocabulary("none")
    tokenizer = source.processor()
    description = _description(source, tokenizer)
    model = description["model"]
    if model.get("type") != "BPE":
        raise RuntimeUnavailable(
            f"the tokenizer of {source.name} is of type {model.get('type')}; GGUF is written for BPE only", REMEDY
        )
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    by_bytes = not model.get("byte_fallback", False)
    tokens, kinds = _tokens(source, description, num_rows, by_bytes)
    first, last = _ends(tokenizer)
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=_word_rule(source, description) if by_bytes else None,
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        merges=tuple(" ".join(pair) for pair in pairs) if by_bytes else (),
        scores=() if by_bytes else tuple(_scores(tokens, pairs)),
        special_ids=_special_ids(tokenizer, num_rows),
        add_bos=first,
        add_eos=last,
        add_space_prefix=not by_bytes and _adds_space(description),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _has_tokenizer(source: Source) -> bool:
    assert source.path is not None
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return any((source.path / name).exists() for name in names)


def _description(source: Source, tokenizer: Any) -> dict[str, Any]:
    """Return what tokenizer.json says, or what the same tokenizer would say where the folder has SentencePiece's."""
    assert source.path is not None
    path = source.path / "tokenizer.json"
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not path.exists() and backend is None:
        raise RuntimeUnavailable(f"the tokenizer of {source.name} has no tokenizer.json", REMEDY)
    text = path.read_text(encoding="utf-8") if path.exists() else backend.to_str()
    description: dict[str, Any] = json.loads(text)
    return description


def _tokens(
    source: Source, description: Mapping[str, Any], num_rows: int, by_bytes: bool
) -> tuple[list[str], list[int]]:
    """Return every token with its kind; rows of the embedding that no token has are named and never used."""
    model = description["model"]
    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    kinds = [UNUSED] * num_rows
    added = {item["id"]: item for item in description.get("added_tokens") or ()}
    entries = {index: token for token, index in model["vocab"].items()} | {k: v["content"] for k, v in added.items()}
    if entries and max(entries) >= num_rows:
        raise ModelError(
            f"the tokenizer of {source.name} has a token {max(entries)}, its embedding {num_rows} rows",
            "open the model with its own tokenizer, or enlarge the embedding (resize_token_embeddings)",
        )
    for index, token in entries.items():
        tokens[index], kinds[index] = token, NORMAL
        if index in added:
            kinds[index] = CONTROL if added[index]["special"] else USER_DEFINED
            tokens[index] = token if by_bytes else token.replace("▁", " ")
        if not by_bytes and token == model.get("unk_token"):
            kinds[index] = UNKNOWN
        elif not by_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = BYTE
    return tokens, kinds


def _word_rule(source: Source, description: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the rule that cuts text into words before byte pairs are joined."""
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    whole = steps[-1] if steps else {}
    if kinds == ["ByteLevel"] and whole.get("use_regex", True) and not whole.get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and whole.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not whole.get("use_regex", True):
        rule = steps[0]["pattern"].get("Regex", "")
        if rule in WORD_RULES and steps[0].get("behavior") == "Isolated":
            return WORD_RULES[rule]
    raise RuntimeUnavailable(
        f"the tokenizer of {source.name} cuts text by {' then '.join(kinds) or 'no rule'}, in a way that llama.cpp is "
        "not known to follow; known are the rules of GPT-2, SmolLM, Llama 3 and Qwen 2",
        REMEDY,
    )


def _steps(part: Mapping[str, Any] | None, list_name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[list_name]) if part["type"] == "Sequence" else [part]


def _scores(tokens: Iterable[str], pairs: Iterable[tuple[str, ...]]) -> list[float]:
    places: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        places.setdefault("".join(pair), place)
    last = len(places)
    return [-float(places.get(token, last)) for token in tokens]


def _special_ids(tokenizer: Any, num_rows: int) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: int(token) for name, token in found.items() if token is not None and token < num_rows}


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer itself puts the begin and end tokens around a text."""
    ids = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    starts = len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id
    return starts, ends


def _adds_space(description: Mapping[str, Any]) -> bool:
    steps = [*_steps(description.get("normalizer"), "normalizers")]
    if any(step["type"] == "Prepend" for step in steps):
        return True
    words = _steps(description.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in words)
