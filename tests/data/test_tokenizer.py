"""Text to tokens and back without loss; files that `transformers` reads; other tokenizers and their end tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Model

from shoal.data import tokenizer
from shoal.data.tokenizer import END
from shoal.errors import DataError
from tests.data.corpora import words


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(iter([words(20_000, i) for i in range(3)]), 400)


TEXT = st.one_of(st.text(), st.text(alphabet=" \n\t\r_a1(é😀<|endoftext|>", max_size=60), st.just(END))


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_bytes_are_their_own_tokens(text):
    tokens = tokenizer.single_bytes().encode([text])[0]
    assert bytes(tokens) == text.encode()
    assert tokenizer.single_bytes().decode(tokens) == text


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_bpe_gives_back_the_text(bpe, text):
    tokens = bpe.encode([text])[0]
    assert bpe.decode(tokens) == text
    assert bpe.end not in tokens


def test_bpe_has_the_size_asked_for_and_learns_indentation(bpe):
    assert bpe.vocab_size == 400
    assert bpe.start == bpe.end == bpe.model.token_to_id(END)
    text = words(5000, 9)
    assert len(bpe.encode([text])[0]) < 0.5 * len(text.encode())
    assert len(bpe.encode(["return\n        "])[0]) < len(bpe.encode(["return 1234"])[0])


def test_bpe_is_the_same_every_time():
    texts = [words(5000, i) for i in range(4)]
    assert len({tokenizer.train_bpe(iter(texts), 350).model.to_str() for _ in range(3)}) == 1


def test_bpe_of_little_text_is_smaller():
    assert 257 <= tokenizer.train_bpe(iter(["abc"]), 5000).vocab_size < 300


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_saved_ones_load_here_and_in_transformers(tmp_path, bpe, kind):
    from transformers import AutoTokenizer

    made = bpe if kind == "bpe" else tokenizer.single_bytes()
    made.save(tmp_path)
    text = words(300, 5) + f"\n\n  {END} x"
    loaded = tokenizer.load(tmp_path)
    assert (loaded.start, loaded.end, loaded.vocab_size) == (made.start, made.end, made.vocab_size)
    assert loaded.encode([text]) == made.encode([text])
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.eos_token_id == made.end
    plain = words(300, 6)
    assert theirs.encode(plain, add_special_tokens=False) == made.encode([plain])[0]
    assert theirs.decode(made.encode([plain])[0]) == plain


def other(folder, *special: str):
    """Somebody else's tokenizer: whole words, and settings that cut and fill."""
    model = Model(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens([AddedToken(s, special=True) for s in special])
    model.enable_truncation(2)
    model.enable_padding(length=7, pad_id=0, pad_token="<unk>")
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_other_tokenizers_neither_cut_nor_fill(tmp_path):
    loaded = tokenizer.load(other(tmp_path, "<s>", "</s>") / "tokenizer.json")
    assert loaded.encode(["a b c a", "b"]) == [[1, 2, 3, 1], [2]]
    assert loaded.vocab_size == 6


@pytest.mark.parametrize(
    ("file", "content", "start", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "<e>", "bos_token": "<s>"}, "<s>", "<e>"),
        ("tokenizer_config.json", {"eos_token": {"content": "<e>"}, "bos_token": None}, "<e>", "<e>"),
        ("special_tokens_map.json", {"eos_token": "<e>"}, "<e>", "<e>"),
        ("config.json", {"eos_token_id": [5, 4], "bos_token_id": 4}, "<s>", "<e>"),
    ],
)
def test_start_and_end_tokens_come_from_the_files_beside(tmp_path, file, content, start, end):
    other(tmp_path, "<s>", "<e>")
    (tmp_path / file).write_text(json.dumps(content))
    loaded = tokenizer.load(tmp_path)
    assert (loaded.model.id_to_token(loaded.start), loaded.model.id_to_token(loaded.end)) == (start, end)
    loaded.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert (again.start, again.end) == (loaded.start, loaded.end)


def test_a_usual_name_is_taken_for_the_end(tmp_path):
    loaded = tokenizer.load(other(tmp_path, "<pad>", "</s>"))
    assert loaded.model.id_to_token(loaded.end) == "</s>"


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(DataError, match="no tokenizer here"):
        tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        tokenizer.load(tmp_path)
    other(tmp_path, "<x>")
    with pytest.raises(DataError, match="which token ends a document"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(DataError, match="cannot be read"):
        tokenizer.load(tmp_path)
