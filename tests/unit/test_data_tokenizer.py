"""Tokenizers: text survives the way there and back, and a text cannot smuggle in control tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.data.tokenizer import check_vocabulary, load_tokenizer, pick_dtype

TEXT = "def add(a, b):\n    return a + b  # naïve, 漢字, 🙂\n"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A byte-level BPE of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


@pytest.fixture
def saved(trained: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    return path


def test_bytes_are_their_own_numbers() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16 and ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([*ids, tokenizer.eos]) == TEXT
    assert (tokenizer.eos, tokenizer.vocab_size) == (256, 264)
    assert tokenizer.encode("").size == 0


def test_bytes_decode_what_a_model_makes_up() -> None:
    assert load_tokenizer("bytes").decode([0x61, 0xE6, 0xBC, 263, 0x62]) == "a\ufffdb"


def test_bytes_encode_a_lone_surrogate() -> None:
    assert load_tokenizer("bytes").encode("a\udc80").tolist() == [ord("a"), ord("?")]


def test_file_encodes_as_its_library_does(saved: Path, trained: Tokenizer) -> None:
    tokenizer = load_tokenizer(str(saved))
    assert tokenizer.encode(TEXT).tolist() == trained.encode(TEXT).ids
    assert [row.tolist() for row in tokenizer.encode_batch([TEXT, "", "a b"])] == [
        trained.encode(text).ids for text in (TEXT, "", "a b")
    ]
    assert tokenizer.decode(tokenizer.encode(TEXT).tolist()) == TEXT
    assert tokenizer.decode([*tokenizer.encode("x"), tokenizer.eos]) == "x"
    assert (tokenizer.vocab_size, tokenizer.eos) == (400, 0)


def test_a_folder_stands_for_its_tokenizer(saved: Path) -> None:
    assert load_tokenizer(str(saved.parent)).sha256 == load_tokenizer(str(saved)).sha256


def test_text_holds_no_control_tokens(saved: Path) -> None:
    tokenizer = load_tokenizer(str(saved))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos not in ids and tokenizer.decode(ids.tolist()) == "a<|endoftext|>b"


def test_saved_truncation_and_padding_are_ignored(saved: Path, trained: Tokenizer) -> None:
    clone = Tokenizer.from_str(trained.to_str())
    clone.enable_truncation(4)
    clone.enable_padding(length=4)
    clone.save(str(saved))
    assert load_tokenizer(str(saved)).encode(TEXT).tolist() == trained.encode(TEXT).ids
    assert load_tokenizer(str(saved)).encode("a").size == 1


def test_separator_is_what_the_configuration_beside_says(saved: Path) -> None:
    before = load_tokenizer(str(saved)).sha256
    config = saved.with_name("tokenizer_config.json")
    for token in ("<stop>", {"content": "<stop>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(str(saved)).eos == 1
    assert load_tokenizer(str(saved)).sha256 != before, "another separator makes other tokens"
    assert load_tokenizer(str(saved), eos="<|endoftext|>").eos == 0
    for odd in ("[]", "{", '{"eos_token": null}'):
        config.write_text(odd)
        assert load_tokenizer(str(saved)).eos == 0


def test_gaps_in_the_vocabulary_count(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["model"]["vocab"]["far"] = 70_000
    saved.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(saved))
    assert tokenizer.vocab_size == 70_001 and tokenizer.encode("a").dtype == np.uint32


def test_narrowest_dtype() -> None:
    assert [pick_dtype(size).str for size in (264, 65536, 65537)] == ["<u2", "<u2", "<u4"]


@pytest.mark.parametrize(
    ("content", "eos", "said"),
    [
        (None, None, "data.tokenizer=.*no such file"),
        ("{}", None, "data.tokenizer=.*is not a tokenizer.json"),
        ("\xff", None, "data.tokenizer=.*is not a tokenizer.json"),
        ("good", "<gone>", "data.eos=<gone> is not a token"),
        ("unnamed", None, "data.eos=null.*set data.eos"),
    ],
)
def test_mistakes_are_named(saved: Path, content: str | None, eos: str | None, said: str) -> None:
    if content is None:
        saved.unlink()
    elif content == "unnamed":
        saved.write_text(saved.read_text().replace("endoftext", "fin"))
    elif content != "good":
        saved.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        load_tokenizer(str(saved), eos)


def test_bytes_have_their_own_separator() -> None:
    with pytest.raises(ValueError, match=r"data\.eos=x"):
        load_tokenizer("bytes", "x")


def test_vocabulary_must_fit_the_model() -> None:
    check_vocabulary(load_tokenizer("bytes"), 264)
    with pytest.raises(ValueError, match=r"model.vocab_size=263 must be at least 264.*data.tokenizer=bytes"):
        check_vocabulary(load_tokenizer("bytes"), 263)
