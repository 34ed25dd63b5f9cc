"""The files beside a model's weights, rewritten for a vocabulary of fewer tokens: every token gets a new number.

The tokens that stay close ranks in their old order. Rewritten are tokenizer.json, the numbers in tokenizer_config.json
and added_tokens.json, and those of special tokens in config.json and generation_config.json. The rewritten tokenizer
is opened by the tokenizers library, which must give every token the number that was meant.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from gossamer.errors import ModelError
from gossamer.models.vocabulary import Vocabulary, processors

TOKENIZER = "tokenizer.json"
ENDINGS = ("_token_id", "_token_ids", "_token_index")  # of settings that are numbers of tokens
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")  # a token that is gone needs no suppression
UNKNOWN = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias", "constraints")
Numbers = Mapping[int, int]  # old -> new


def trimmed_tokenizer(vocabulary: Vocabulary, kept: Sequence[int]) -> dict[str, Any]:
    """Return tokenizer.json with the tokens that stay, numbered anew. Raises ModelError where it does not open so."""
    new = {old: number for number, old in enumerate(kept)}
    found = copy.copy(dict(vocabulary.tokenizer))
    model = dict(vocabulary.model)
    stays = [number for number in vocabulary.words if number in new]
    if vocabulary.kind == "Unigram":
        model["vocab"] = [model["vocab"][number] for number in stays]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {vocabulary.words[number]: new[number] for number in stays}
    if vocabulary.kind == "BPE":
        words = model["vocab"]
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], vocabulary.merges, strict=True)
            if left in words and right in words and vocabulary.joined(left, right) in words
        ]
    found["model"] = model
    found["added_tokens"] = [{**one, "id": new[one["id"]]} for one in found.get("added_tokens") or ()]
    if found.get("padding"):
        found["padding"] = {**found["padding"], "pad_id": new[found["padding"]["pad_id"]]}
    found["post_processor"] = copy.deepcopy(found.get("post_processor"))
    for rule in processors(found["post_processor"]):
        for special in (rule.get("special_tokens") or {}).values():
            special["ids"] = [new[number] for number in special["ids"]]
        for name in ("sep", "cls"):
            if name in rule:
                rule[name] = [rule[name][0], new[rule[name][1]]]
    names = vocabulary.added | vocabulary.words
    _check_numbers(found, {names[old]: number for old, number in new.items()})
    return found


def _check_numbers(tokenizer: Mapping[str, Any], wanted: Mapping[str, int]) -> None:
    """Raise ModelError where the tokenizers library numbers a token otherwise than was meant."""
    try:
        numbers = Tokenizer.from_str(as_text(tokenizer).decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"its trimmed tokenizer does not open: {error}", "leave its vocabulary as it is") from error
    wrong = [token for token, number in wanted.items() if numbers.get(token) != number]
    if wrong or len(numbers) != len(wanted):
        raise ModelError(
            f"its trimmed tokenizer has {len(numbers)} tokens where {len(wanted)} were meant"
            + (f", and numbers {wrong[0]!r} as {numbers.get(wrong[0])}, not {wanted[wrong[0]]}" if wrong else ""),
            "leave its vocabulary as it is, and say so to us",
        )


def trimmed_files(files: Mapping[str, bytes], vocabulary: Vocabulary, kept: Sequence[int]) -> dict[str, bytes]:
    """Return the files beside the weights that change, by name: tokenizer, and what holds numbers of tokens.

    `files` are those of the model, config.json without its `vocab_size`, which the caller knows the name of.
    """
    new = {old: number for number, old in enumerate(kept)}
    found = {TOKENIZER: as_text(trimmed_tokenizer(vocabulary, kept))}
    if "tokenizer_config.json" in files:
        settings = renumbered(json.loads(files["tokenizer_config.json"]), new)
        if settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {
                str(new[int(old)]): token for old, token in settings["added_tokens_decoder"].items() if int(old) in new
            }
        found["tokenizer_config.json"] = as_text(settings, indent=2)
    if "added_tokens.json" in files:
        added = json.loads(files["added_tokens.json"])
        found["added_tokens.json"] = as_text({token: new[old] for token, old in added.items()}, indent=2)
    for name in ("config.json", "generation_config.json"):
        if name in files:
            found[name] = as_text(renumbered(json.loads(files[name]), new), indent=2)
    return found


def token_ids(settings: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of tokens that a config names, through the configs inside it."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from token_ids(value)
        elif str(name).endswith(ENDINGS):
            yield from (number for number in (value if isinstance(value, list) else [value]) if _is_number(number))


def renumbered(settings: Mapping[str, Any], new: Numbers) -> dict[str, Any]:
    """Return a config with the new numbers of tokens. Raises ModelError for settings whose form is not understood."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found[name] = renumbered(value, new)
        elif str(name).endswith(ENDINGS):
            found[name] = [new.get(n, n) for n in value] if isinstance(value, list) else _renumbered(value, new)
        elif name in SUPPRESSED and value:
            found[name] = [new[number] for number in value if number in new]
        elif name in UNKNOWN and value:
            raise ModelError(f"{name} of its config names tokens in a way that is not understood", "take it out first")
        else:
            found[name] = value
    return found


def _renumbered(value: Any, new: Numbers) -> Any:
    return new.get(value, value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def as_text(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return JSON as the files hold it: a tokenizer's tables without spaces, settings to be read by people."""
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, ensure_ascii=False, indent=indent, separators=separators) + "\n").encode()
