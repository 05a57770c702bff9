"""A model whose blocks are on several ranks writes what it writes in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from shoal.checkpoint import huggingface
from shoal.cli.main import main
from shoal.errors import JobError, LayoutError, ModelError
from shoal.launch.generate import generate
from tests.models import tiny


@pytest.fixture(scope="module", params=["llama", "tied"])
def folder(request, tmp_path_factory) -> Path:
    """A model of three blocks with a tokenizer of one token a word."""
    path = tmp_path_factory.mktemp(request.param)
    model = tiny.decoder(tiny.CASES[request.param])
    last = model.options.vocab_size - 1
    words = {f"w{i}": i for i in range(last)} | {"<end>": last}
    known = tokenizers.Tokenizer(WordLevel(words, unk_token="w0"))
    known.pre_tokenizer = WhitespaceSplit()
    known.add_special_tokens(["<end>"])
    known.save(str(path / "words.json"))
    huggingface.export(model.options, model.named_parameters(), path, tokenizer=path / "words.json", end_token=last)
    return path


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_one_process(ranks, folder, stages, temperature):
    options = {"max_tokens": 12, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": 3}
    expected = generate(folder, "w1 w5 w2", **options)
    texts = ranks.run(
        "shoal.serving.staged:main", stages, model=str(folder), tokenizer=str(folder), prompt="w1 w5 w2",
        layout=f"pipeline={stages}", **options,
    )  # fmt: skip
    assert expected
    assert texts == [expected] * stages


def test_the_command_prints_it_as_it_comes(folder, capfd):
    words = ["generate", str(folder), "--prompt", "w1 w5", "--max-tokens", "6", "--temperature", "0"]
    assert main(words) == 0
    alone = capfd.readouterr().out
    assert main([*words, "--layout", "pipeline=2"]) == 0
    assert capfd.readouterr().out == alone
    assert alone.startswith("w1 w5")


def test_what_cannot_be_is_refused(ranks, folder):
    with pytest.raises(LayoutError, match="is not built"):
        generate(folder, "w1", layout="tensor=2")
    with pytest.raises(JobError, match="in memory"):
        generate(tiny.decoder(tiny.BASE), "w1", layout="pipeline=2")
    with pytest.raises(ModelError, match="context"):
        ranks.run(
            "shoal.serving.staged:main", 2, model=str(folder), tokenizer=str(folder), prompt="w1 " * 500,
            layout="pipeline=2", max_tokens=2, temperature=0.0, top_k=0, top_p=1.0, seed=0,
        )  # fmt: skip
