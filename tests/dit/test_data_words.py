"""The vocabulary: fixed numbering, padding and unknown words, and back to text."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from ditscale.dit.data import EmojiScenes, Vocabulary, emoji_vocabulary
from ditscale.dit.data.words import split_words
from ditscale.errors import InputError


def test_round_trip_with_punctuation() -> None:
    captions = [
        "a red apple (fruit) above a cat face on blue",
        "a dog, a woman's hat and six o'clock from left to right",
    ]
    vocabulary = Vocabulary.from_captions(captions)
    tokens = vocabulary.encode(captions, 20)
    assert tokens.dtype == np.int64 and tokens.shape == (2, 20)
    assert vocabulary.decode(tokens) == captions


def test_padding_unknown_and_cut() -> None:
    vocabulary = Vocabulary(["apple", "red"])
    assert vocabulary.encode(["Red apple!", "red zebra", "red red red red"], 3).tolist() == [
        [3, 2, 0],
        [3, 1, 0],
        [3, 3, 3],
    ]
    assert vocabulary.decode(np.array([[3, 1, 0]])) == ["red <unknown>"]
    assert len(vocabulary) == 4 and "red" in vocabulary and "zebra" not in vocabulary


def test_special_words_cannot_be_spelled() -> None:
    assert Vocabulary(["a"]).encode(["<unknown>"], 3).tolist() == [[1, 0, 0]]


def test_words_of_any_script_are_whole() -> None:
    captions = ["Größe, cafe\u0301 CAFÉ", "猫と犬", "हिन्दी l'été – “x-ray”", "snake_case ❤\ufe0f ä_b"]
    assert [split_words(caption) for caption in captions] == [
        ["größe", ",", "café", "café"],
        ["猫と犬"],
        ["हिन्दी", "l'été", "x", "ray"],
        ["snake", "case", "ä", "b"],
    ]
    vocabulary = Vocabulary.from_captions(captions)
    assert vocabulary.decode(vocabulary.encode(captions[:1], 8)) == ["größe, café café"]


def test_words_of_ascii_are_those_that_models_were_trained_on() -> None:
    """Whatever surrounds a word, and in the captions of both kinds of emoji scenes."""
    former = re.compile(r"[a-z0-9']+|[,()]")
    ascii_pairs = ["".join(pair) for pair in itertools.product(map(chr, range(128)), repeat=2)]
    scenes = [EmojiScenes(split, 16).batch(0, 500).captions for split in ("train", "validation")]
    for caption in itertools.chain(ascii_pairs, *scenes):
        assert split_words(caption) == former.findall(caption.lower()), caption


def test_emoji_vocabulary_is_fixed() -> None:
    """The numbering is part of every trained model: it may only change with `scenes.VERSION`."""
    vocabulary = emoji_vocabulary()
    assert vocabulary.sha256 == "6272c4f449eeb31109281acde0da8edc6ea195b1e1738d7194091065bb8cdc92"
    assert vocabulary is EmojiScenes("validation").vocabulary
    assert {"apple", "above", "blue", "gradient", "(", ","} <= set(vocabulary.words)


def test_identity_follows_the_order() -> None:
    assert Vocabulary(["a", "b"]).sha256 != Vocabulary(["b", "a"]).sha256


def test_bad_input() -> None:
    vocabulary = Vocabulary(["a"])
    with pytest.raises(InputError, match="captions: expected a list of strings"):
        vocabulary.encode("a", 3)
    with pytest.raises(InputError, match="length: expected at least 1"):
        vocabulary.encode(["a"], 0)
    with pytest.raises(InputError, match="tokens: expected"):
        vocabulary.decode(np.array([[7]]))
    with pytest.raises(InputError, match="words: expected each word once"):
        Vocabulary(["a", "a"])
