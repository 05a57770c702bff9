"""Generation with a cache: the same logits as without it, the greedy text of transformers, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.checkpoint import huggingface
from shoal.cli.main import main
from shoal.errors import DataError, JobError, ModelError
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.serving import cache
from shoal.serving.cache import Cache
from shoal.serving.generate import generate, tokens
from shoal.serving.load import load
from shoal.serving.sampler import Sampling, draw
from shoal.serving.text import PromptTokenizer, Stream, load_tokenizer
from tests.models import tiny

END = 66


def in_pieces(model: Decoder, tokens_BL: Tensor, sizes: list[int]) -> Tensor:
    """Logits of all positions, the tokens given to a cached model piece by piece."""
    held = Cache(model.options, tokens_BL.shape[0], tokens_BL.shape[1], torch.float32, torch.device("cpu"))
    out = []
    for piece_BL in tokens_BL.split(sizes, 1):
        position_BL = torch.arange(held.length, held.length + piece_BL.shape[1])[None]
        out.append(model(piece_BL, position_BL, held.attend))
        held.advance(piece_BL.shape[1])
    return torch.cat(out, 1)


@pytest.mark.parametrize("case", ["llama", "one_key_head", "llama3"])
@pytest.mark.parametrize("sizes", [[1] * 12, [7, 1, 1, 1, 1, 1], [4, 5, 3], [12]], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached(case: str, sizes: list[int]) -> None:
    model, tokens_BL = tiny.decoder(tiny.CASES[case]), tiny.tokens(3, 12)
    whole = model(tokens_BL)
    assert (in_pieces(model, tokens_BL, sizes) - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.no_grad()
def test_sees_planted_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new piece that sees its own future."""
    model, tokens_BL = tiny.decoder(tiny.BASE), tiny.tokens(3, 12)
    monkeypatch.setattr(cache.Cache, "_mask", lambda self, start, stop: None)
    whole = model(tokens_BL)
    assert (in_pieces(model, tokens_BL, [4, 5, 3]) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["llama", "tied", "wide_heads", "llama3"])
def test_greedy_equals_transformers(case: str) -> None:
    model = tiny.decoder(tiny.CASES[case])
    prompt = tiny.tokens(1, 9)
    twin = tiny.transformers_twin(model)
    theirs = twin.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=25, do_sample=False, eos_token_id=None
    )
    assert list(tokens(model, prompt[0].tolist(), 25, Sampling(0.0), seed=0)) == theirs[0, 9:].tolist()


def test_seed_decides() -> None:
    model = tiny.decoder(tiny.BASE)
    first, again, other = (list(tokens(model, [1, 2], 20, Sampling(), seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_temperature_near_0_is_greedy_and_logits_that_are_no_numbers_are_refused() -> None:
    model = tiny.decoder(tiny.BASE)
    cold, greedy = (list(tokens(model, [1, 2], 20, Sampling(t), seed=0)) for t in (1e-40, 0.0))
    assert cold == greedy
    for bad in (torch.nan, torch.inf):
        logits_BV = torch.tensor([[0.0, bad, 1.0]])
        for temperature in (0.0, 1.0):
            with pytest.raises(ModelError, match="not finite"):
                draw(logits_BV, Sampling(temperature), torch.Generator())


def test_a_seed_out_of_range_is_refused(folder: Path) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(JobError, match="seed"):
            generate(folder, "ABC", seed=seed)
    assert generate(folder, "ABC", max_tokens=2, seed=2**64 - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 67 words of one letter, and the last one ends a text."""
    path = tmp_path_factory.mktemp("model")
    words = {chr(0x21 + i): i for i in range(END)} | {"<end>": END}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="!"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "words.json"))
    model = tiny.decoder(tiny.BASE)
    huggingface.export(model.options, canonical(model), path, tokenizer=path / "words.json", end_token=END)
    return path


def test_from_a_folder_streaming(folder: Path) -> None:
    pieces: list[str] = []
    text = generate(folder, "ABC", max_tokens=15, seed=3, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert text == generate(load(folder), "ABC", tokenizer=folder, max_tokens=15, seed=3)
    assert text != generate(folder, "ABC", max_tokens=15, seed=4)


def test_stops_at_the_end_token(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[END] = 1.0
    assert generate(model, "A", tokenizer=folder, temperature=0, max_tokens=50) == ""
    assert load_tokenizer(folder).ends == {END}


def test_empty_prompt_starts_from_the_end_token(folder: Path) -> None:
    start = load_tokenizer(folder).encode("")
    assert start == [END]
    assert isinstance(generate(folder, max_tokens=3), str)


def test_context_is_never_exceeded(folder: Path) -> None:
    """128 tokens of context: 120 of prompt leave room for 8."""
    notices: list[str] = []
    text = generate(folder, "A" * 120, max_tokens=50, seed=1, say=notices.append)
    assert len(text) == 8
    assert "128 tokens is full" in notices[0]
    notices.clear()
    assert len(generate(folder, "A" * 120, max_tokens=8, seed=1, say=notices.append)) == 8
    assert notices == []
    with pytest.raises(ModelError, match="128 tokens and the model's context 128"):
        generate(folder, "A" * 128)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_options_out_of_range(options: dict[str, float], named: str, folder: Path) -> None:
    with pytest.raises(JobError, match=named):
        generate(folder, "A", **options)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"neither job\.toml nor config\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"neither job\.toml nor config\.json"):
        generate(tmp_path, "A")
    (tmp_path / "a.txt").write_text("A")
    for use in (load, generate):
        with pytest.raises(ModelError, match=r"a\.txt: is a file, neither a run nor a model folder"):
            use(tmp_path / "a.txt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer"):
        generate(tmp_path, "A")
    with pytest.raises(ModelError, match="there is no such folder"):
        generate(tmp_path / "nowhere", "A")
    with pytest.raises(ModelError, match="has no tokenizer"):
        generate(load(folder), "A")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot read"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_another_model(folder: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 500}, unk_token="A"))
    with pytest.raises(ModelError, match="token 500, the model knows 67"):
        generate(load(folder), "A", tokenizer=PromptTokenizer(words, 0, frozenset()))


def byte_level() -> PromptTokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return PromptTokenizer(inner, 0, frozenset())


def metaspace() -> PromptTokenizer:
    """As Llama 2: words carry the space before them, and the first one's is taken away in decoding."""
    words = {c: i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    return PromptTokenizer(inner, 0, frozenset())


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=20), st.data()
)
def test_streamed_text_is_the_whole_text(text: str, data: st.DataObject) -> None:
    """Characters of several bytes come out whole, wherever the prompt ends."""
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    pieces: list[str] = []
    cut = data.draw(st.sampled_from([i for i in range(len(ids) + 1) if "\ufffd" not in tokenizer.decode(ids[:i])]))
    stream = Stream(tokenizer, ids[:cut], pieces.append)
    for token in ids[cut:]:
        stream.add(token)
    assert tokenizer.decode(ids[:cut]) + stream.end() == text
    assert "".join(pieces) == stream.text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=6))
def test_spaces_between_words_survive_streaming(words: list[str]) -> None:
    tokenizer = metaspace()
    stream = Stream(tokenizer, tokenizer.encode(words[0]))
    for token in tokenizer.encode(" ".join(words))[len(tokenizer.encode(words[0])) :]:
        stream.add(token)
    assert stream.end() == " " + " ".join(words[1:])
    # Planted bug: decoding each token by itself.
    alone = "".join(tokenizer.decode([t]) for t in tokenizer.encode(" ".join(words)))
    assert " " not in alone


def test_unfinished_character_is_not_lost() -> None:
    tokenizer = byte_level()
    stream = Stream(tokenizer, tokenizer.encode("a"))
    for token in tokenizer.encode("€")[:2]:
        stream.add(token)
    assert stream.text == ""
    assert set(stream.end()) == {"\ufffd"}


def test_the_prompt_is_shown_when_all_has_been_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the error follows it on the same line."""
    assert main(["generate", str(folder), "--prompt", "A" * 128]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: the prompt has 128 tokens")
    assert main(["generate", str(folder), "--prompt", "ABC", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == f"ABC{generate(folder, 'ABC', max_tokens=5)}\n"


def test_the_prompt_is_shown_where_nothing_follows(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shoal.serving.generate.generate", lambda *args, **options: "")
    assert main(["generate", "x", "--prompt", "ABC"]) == 0
    assert capsys.readouterr().out == "ABC\n"
