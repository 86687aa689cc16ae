"""Texts of all scripts as numbers, against their definition."""

import binascii
import re

import pyarrow as pa
import pytest
import torch

from rwalk import bench
from rwalk.bench import Training, texts
from rwalk.bench.data import load
from stored import splits


def number(word):
    return binascii.crc32(word.encode()) % 8192 + 1


def runs(writing):
    """All runs of one to three characters, and the whole if it is longer."""
    some = {writing[i:j] for i in range(len(writing)) for j in range(i + 1, min(i + 3, len(writing)) + 1)}
    return {number(part) for part in some | {writing}}


@pytest.mark.parametrize("text", [
    "Play: the NEXT song, don't stop at 3.14!", "I'm naïve; she's at the café (très bien) — “it’s fine” 100% 😀 ❤️ 1️⃣",
    "cafe\u0301 nai\u0308ve", "snake_case and under_scores", "", "...", "Straße größer", "one " * 200, "a" * 45,
    "Donaudampfschifffahrtsgesellschaft", "Привет, мир", "나는 영화를 좋아한다", "Türkiye İstanbul", "ﬁn ½ x²",
])  # fmt: skip
def test_words_with_spaces_are_numbered_as_ever(text):
    assert texts.tokens(text) == [number(word) for word in re.findall(r"[\w']+", text.lower())[:128]]


@pytest.mark.parametrize("text", [
    "我喜欢这部电影", "東京都", "ありがとう", "コンピューター", "ｶﾀｶﾅ", "ฉันชอบหนังเรื่องนี้",
    "ສະບາຍດີ", "ខ្ញុំស្រឡាញ់", "မြန်မာစာ", "བོད་", "人々", "𠮷野家",
    "中", "acgt" * 12, "x" * 46,
])  # fmt: skip
def test_writing_without_spaces_is_numbered_by_its_runs(text):
    parts = [part for part in re.split("་", text) if part]
    assert set(texts.tokens(text)) == set().union(*map(runs, parts))


def test_scripts_may_be_mixed():
    """A word in Latin letters has the number that it has anywhere else."""
    came = set(texts.tokens("我用Python写代码，很好玩。 Hello世界!"))
    assert came == runs("我用") | runs("写代码") | runs("很好玩") | runs("世界") | {number("python"), number("hello")}


@pytest.mark.parametrize(("text", "words"), [
    ("मुझे हिन्दी पसंद है।", ["मुझे", "हिन्दी", "पसंद", "है"]), ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]), ("مَرْحَبًا", ["مَرْحَبًا"]),
])  # fmt: skip
def test_vowel_signs_do_not_part_words(text, words):
    assert texts.tokens(text) == [number(word) for word in words]


def test_so_many_characters_are_read_as_words():
    assert texts.tokens("字" * 1000) == texts.tokens("字" * 128)
    assert texts.tokens("word " * 100 + "好" * 1000) == texts.tokens("word " * 100 + "好" * 28)
    assert texts.tokens("好" * 200 + " word") == texts.tokens("好" * 128)


def sentences(words, count, seed):
    """Characters at random, among them one of two words; which of them is the label."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0x4E00, 0x9FA5, (count, 12), generator=generator).tolist()
    places = torch.randint(12, (count,), generator=generator).tolist()
    labels = [k % 2 for k in range(count)]
    made = [
        "".join(map(chr, d[:p])) + words[y] + "".join(map(chr, d[p:])) for d, p, y in zip(draws, places, labels, strict=True)
    ]
    return {"text": made, "label": labels}


@pytest.mark.parametrize("words", [("喜欢", "讨厌"), ("ชอบ", "เกลียด")])
def test_what_a_sentence_without_spaces_says_can_be_learned(tmp_path, words):
    folder = splits(tmp_path / "d", sentences(words, 300, 0), sentences(words, 100, 1))
    record = bench.run(
        bench.split(folder, tasks=1), training=Training(epochs=10, batch_size=50, optimizer="adam", lr=0.01, hidden=(32,))
    )
    assert record.scores[0][0] > 0.9


def test_texts_without_a_word(tmp_path):
    """One may be empty, or all of test; of training some has to have words."""
    data = load(splits(tmp_path / "a", {"text": ["", "hi", "😀"], "label": [0, 1, 0]}, {"text": ["", "!"], "label": [0, 1]}))
    assert data.train_x.tolist() == [[0], [number("hi")], [0]]
    assert data.test_x.tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="training texts of `b` have no words"):
        load(splits(tmp_path / "b", {"text": ["", "😀"], "label": [0, 1]}))


def test_texts_in_a_dictionary_are_texts(tmp_path):
    columns = {"text": ["so it goes", "it is"], "label": [0, 1]}
    plain = load(splits(tmp_path / "a", columns))
    coded = load(splits(tmp_path / "b", columns | {"text": pa.array(columns["text"]).dictionary_encode()}))
    assert torch.equal(plain.train_x, coded.train_x)
    assert coded.tokens == plain.tokens


def test_texts_that_cannot_be_read_are_named_by_file_and_row(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"]).buffers())
    with pytest.raises(ValueError, match=r"column `text` of `a` cannot be read .row 1 of train.parquet.*UTF-8"):
        load(splits(tmp_path / "a", {"text": broken, "label": [0, 1]}))
    with pytest.raises(ValueError, match=r"missing texts .row 1 of test.parquet"):
        load(splits(tmp_path / "b", {"text": ["a", "b"], "label": [0, 1]}, {"text": ["a", None], "label": [0, 1]}))


def test_texts_to_be_continued_that_are_too_short(tmp_path):
    for k, (train, test, split) in enumerate([("a" * 128, "b" * 200, "train"), ("a" * 200, "b" * 128, "test")]):
        with pytest.raises(ValueError, match=f"{split} texts of .* are shorter than a window.*more than 128 bytes"):
            load(splits(tmp_path / str(k), {"text": [train]}, {"text": [test]}))
