"""Tokenizers of three kinds, trained here and cut: any text still becomes tokens, the domain's the same as before."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gossamer.errors import ModelError
from gossamer.models.tokenizer_files import renumbered, token_ids, trimmed_files, trimmed_tokenizer
from gossamer.models.vocabulary import BYTES, Vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SYLLABLES = ["ka", "lo", "mi", "tar", "ven", "shu", "pel", "or", "ing", "an", "est", "qua", "dri", "ém", "zö", "日本"]


def sentences(count: int, seed: int, syllables: list[str]) -> list[str]:
    """Return sentences of made-up words."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choice(syllables) for _ in range(draw.randrange(1, 5)))

    words = [word() for _ in range(200)]
    return [" ".join(draw.choice(words) for _ in range(draw.randrange(3, 12))) + "." for _ in range(count)]


CORPUS = sentences(400, 0, SYLLABLES)
DOMAIN = sentences(40, 1, SYLLABLES[:6])  # other words, of fewer syllables


def around(tokenizer: Tokenizer) -> Any:
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    return processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL))
    tokenizer.post_processor = around(tokenizer)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = {name: (name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.RobertaProcessing(ends["</s>"], ends["<s>"])
    tokenizer.add_special_tokens(["<mask>"])  # behind all others
    return tokenizer


def word_ends() -> Tokenizer:
    """Return a BPE as CLIP's: the last character of a word has a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def many_ways() -> Tokenizer:
    """Return a BPE as Llama's: whole sentences are joined, a token comes about in several ways, bytes for the rest."""
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"])
    )
    pieces = [piece for piece, _ in json.loads(learned.to_str())["model"]["vocab"]]
    singles = sorted({letter for piece in pieces[1:] for letter in piece})
    words = list(dict.fromkeys(["<unk>", *BYTES, *(p for p in pieces[1:] if len(p) > 1), *singles]))
    numbers = {word: number for number, word in enumerate(words)}
    found = [(w[:cut], w[cut:]) for w in words for cut in range(1, len(w)) if w[:cut] in numbers and w[cut:] in numbers]
    merges = sorted((pair for pair in found if pair[0] + pair[1] not in BYTES), key=lambda p: numbers[p[0] + p[1]])
    tokenizer = Tokenizer(
        models.BPE(vocab=numbers, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def unigram(byte_fallback: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<s>", "<pad>", "</s>", "<unk>"]),
    )
    if byte_fallback:
        written = json.loads(tokenizer.to_str())
        written["model"]["vocab"] += [[token, -12.0] for token in BYTES]
        written["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def unigram_of_bytes() -> Tokenizer:
    return unigram(byte_fallback=True)


KINDS = [word_piece, byte_level, word_ends, many_ways, unigram, unigram_of_bytes]
MADE: dict[Callable[[], Tokenizer], Tokenizer] = {}


def made(kind: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the tokenizer of a kind, trained once."""
    if kind not in MADE:
        MADE[kind] = kind()
    return MADE[kind]


def counted(tokenizer: Tokenizer, texts: list[str]) -> Counter[int]:
    return Counter(number for text in texts for number in tokenizer.encode(text).ids)


def cut(tokenizer: Tokenizer, texts: list[str], size: int | None = None) -> tuple[Tokenizer, tuple[int, ...]]:
    """Return the tokenizer with the tokens of some texts, and the old numbers of those that stay."""
    vocabulary = Vocabulary(json.loads(tokenizer.to_str()))
    kept = vocabulary.chosen(counted(tokenizer, texts), vocabulary.held, least=1, size=size)
    return Tokenizer.from_str(json.dumps(trimmed_tokenizer(vocabulary, kept))), kept


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_domain_become_the_same_tokens(kind: Any) -> None:
    before = made(kind)
    after, kept = cut(before, DOMAIN)
    assert len(kept) < 0.9 * before.get_vocab_size()
    for text in DOMAIN:
        was, now = before.encode(text), after.encode(text)
        assert now.tokens == was.tokens
        assert [kept[number] for number in now.ids] == was.ids
    pair = before.encode(DOMAIN[0], DOMAIN[1]), after.encode(DOMAIN[0], DOMAIN[1])
    assert pair[0].tokens == pair[1].tokens
    assert pair[0].type_ids == pair[1].type_ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_becomes_tokens(kind: Any) -> None:
    before = made(kind)
    after, kept = cut(before, DOMAIN[:4])
    unknown = before.token_to_id("[UNK]") or before.token_to_id("<unk>")

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40) | st.sampled_from(CORPUS))
    def check(text: str) -> None:
        was, now = before.encode(text), after.encode(text)
        assert all(0 <= number < len(kept) for number in now.ids)
        if text and unknown not in was.ids:  # what was read before is read, and not as unknown
            assert unknown not in [kept[number] for number in now.ids]
        assert bool(was.ids) == bool(now.ids)

    check()


@pytest.mark.parametrize("kind", [byte_level, many_ways])
def test_any_text_comes_back_from_its_bytes(kind: Any) -> None:
    after, _ = cut(made(kind), DOMAIN[:2])
    if kind is many_ways:
        after.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
    def check(text: str) -> None:
        found = after.decode(after.encode(text).ids, skip_special_tokens=False)
        if kind is many_ways:
            assert found == "▁" + text.replace(" ", "▁")
        else:
            assert found == f"<s>{text}</s>"

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_tokens_stay_as_are_asked_for(kind: Any) -> None:
    before = made(kind)
    vocabulary = Vocabulary(json.loads(before.to_str()))
    least, most = len(vocabulary.held), before.get_vocab_size()
    counts = counted(before, DOMAIN)
    for size in {least, least + 1, least + 17, (least + most) // 2, most - 1, most}:
        kept = vocabulary.chosen(counts, vocabulary.held, least=1, size=size)
        assert len(kept) == size
        assert vocabulary.held <= set(kept)
        after = Tokenizer.from_str(json.dumps(trimmed_tokenizer(vocabulary, kept)))
        assert after.get_vocab_size() == size
    assert kept == tuple(vocabulary.tokens) or size != most


@pytest.mark.parametrize("kind", [byte_level, word_ends, many_ways])
def test_every_token_that_stays_can_still_come_about(kind: Any) -> None:
    vocabulary = Vocabulary(json.loads(made(kind).to_str()))
    kept = vocabulary.chosen(counted(made(kind), DOMAIN), vocabulary.held, least=1, size=None)
    after = Vocabulary(trimmed_tokenizer(vocabulary, kept))
    for number, word in vocabulary.words.items():
        if number in kept and number not in vocabulary.added and vocabulary.needed(number) != {number}:
            way = {vocabulary.words[part] for part in vocabulary.needed(number)}
            assert {after.words[part] for part in after.needed(after.numbers[word])} == way


def test_the_way_to_a_token_is_the_one_that_joining_takes() -> None:
    """A token's parts by hand: ab before bc, so abc comes of ab and c, and bc is never seen."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, "merges": []}
    merges = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    assert Vocabulary({"model": {**model, "merges": merges}}).needed(5) == {0, 1, 2, 3, 5}
    lonely = Vocabulary({"model": {**model, "merges": merges[:3]}})
    assert lonely.needed(5) == {5}, "ab c is joined no further: abc never comes about"


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_fewest_that_spell_a_token(kind: Any) -> None:
    """Beside every way to cut it, tried one by one."""
    vocabulary = Vocabulary(json.loads(made(kind).to_str()))
    words = set(random.Random(0).sample(sorted(vocabulary.numbers), len(vocabulary.numbers) // 2))
    for number, word in list(vocabulary.words.items())[::7]:
        symbols = vocabulary._symbols(word)
        if len(symbols) > 9:
            continue
        fewest = len(symbols) + 1
        for borders in range(1, 1 << (len(symbols) - 1)):
            parts = [symbols[0]]
            for place, symbol in enumerate(symbols[1:]):
                parts = (
                    [*parts, symbol] if borders >> place & 1 else [*parts[:-1], vocabulary.joined(parts[-1], symbol)]
                )
            fewest = min(fewest, len(parts)) if words.issuperset(parts) else fewest
        assert vocabulary.pieces(number, words) == fewest


def test_frequent_tokens_stay_before_rare_ones_and_low_numbers_before_high() -> None:
    words = {"[UNK]": 0, "a": 1, "##a": 2, "aa": 3, "aaa": 4, "##aa": 5, "aaaa": 6}
    vocabulary = Vocabulary({"model": {"type": "WordPiece", "vocab": words, "unk_token": "[UNK]",
                                       "continuing_subword_prefix": "##"}})  # fmt: skip
    assert vocabulary.held == {0, 1, 2}
    counts = {6: 2, 5: 9, 3: 1}
    assert vocabulary.chosen(counts, vocabulary.held, least=1, size=4) == (0, 1, 2, 5)
    assert vocabulary.chosen(counts, vocabulary.held, least=1, size=5) == (0, 1, 2, 5, 6)
    assert vocabulary.chosen({6: 2, 3: 3}, vocabulary.held, least=1, size=4) == (0, 1, 2, 6), "aaaa takes three, aa two"
    assert vocabulary.chosen(counts, vocabulary.held, least=3, size=5) == (0, 1, 2, 3, 5)
    assert vocabulary.chosen(counts, vocabulary.held, least=2, size=None) == (0, 1, 2, 5, 6)


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="of kind WordLevel") as found:
        Vocabulary({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    assert found.value.hint == "WordPiece, BPE, Unigram can be trimmed"


def test_settings_that_are_numbers_of_tokens_are_found_at_any_depth() -> None:
    config = {
        "pad_token_id": 3, "eos_token_id": [5, 7], "vocab_size": 9, "text_config": {"bos_token_id": 7},
        "a_token_id": -1, "id2label": {0: "x"}, "suppress_tokens": [2, 7],
    }  # fmt: skip
    assert sorted(token_ids(config)) == [3, 5, 7, 7]
    after = renumbered(config, {3: 0, 5: 1, 7: 2})
    assert after == {**config, "pad_token_id": 0, "eos_token_id": [1, 2], "text_config": {"bos_token_id": 2},
                     "suppress_tokens": [2]}  # fmt: skip
    with pytest.raises(ModelError, match="bad_words_ids"):
        renumbered({"bad_words_ids": [[1]]}, {})


def test_all_files_that_number_tokens_are_rewritten() -> None:
    vocabulary = Vocabulary(json.loads(made(byte_level).to_str()))
    kept = vocabulary.chosen({}, vocabulary.held, least=1, size=None)
    last = kept[-1]
    files = {
        "tokenizer.json": b"",
        "tokenizer_config.json": json.dumps(
            {"added_tokens_decoder": {"0": {"content": "<s>"}, str(last): {}}}
        ).encode(),
        "added_tokens.json": json.dumps({"<mask>": last}).encode(),
        "config.json": json.dumps({"mask_token_id": last, "vocab_size": 701}).encode(),
    }
    found = {name: json.loads(content) for name, content in trimmed_files(files, vocabulary, kept).items()}
    assert found.keys() == files.keys()
    assert list(found["tokenizer_config.json"]["added_tokens_decoder"]) == ["0", str(len(kept) - 1)]
    assert found["added_tokens.json"] == {"<mask>": len(kept) - 1}
    assert found["config.json"]["mask_token_id"] == len(kept) - 1
    assert found["tokenizer.json"]["added_tokens"][-1]["id"] == len(kept) - 1
