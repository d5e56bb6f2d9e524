"""Drawing text: greedy, by temperature, top-k and top-p; the same seed; characters never cut in two."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from small_models import make_config, make_model

from training.config import SamplingConfig
from training.data.tokenizer import ByteTokenizer
from training.generate import continue_text, generate, pick, show_controls, stream

PROMPT = [3, 1, 4, 1, 5]


def draw(**changes: object) -> list[int]:
    model = make_model(make_config(vocab_size=19, mtp=1))
    sampling = SamplingConfig(**{"tokens": 12, **changes})  # type: ignore[arg-type]
    return list(generate(model, PROMPT, sampling, stop=-1))


def test_greedy_is_the_best_token_each_time() -> None:
    model = make_model(make_config(vocab_size=19, mtp=1))
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert draw(temperature=0.0) == tokens[len(PROMPT) :]
    assert draw(temperature=1.0, top_k=1) == draw(temperature=1.0, top_p=1e-9) == tokens[len(PROMPT) :]


def test_a_seed_gives_one_text() -> None:
    assert draw(temperature=1.5, seed=3) == draw(temperature=1.5, seed=3)
    assert len({tuple(draw(temperature=1.5, seed=seed)) for seed in range(4)}) == 4


def test_ends_before_the_stop_token() -> None:
    free = draw(temperature=0.0)
    model = make_model(make_config(vocab_size=19, mtp=1))
    stopped = list(generate(model, PROMPT, SamplingConfig(tokens=12, temperature=0.0), stop=free[4]))
    assert stopped == free[: free.index(free[4])]


def shares(logits: Sequence[float], **changes: object) -> list[float]:
    """How often each token is drawn."""
    sampling = SamplingConfig(**{"temperature": 1.0, **changes})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(torch.tensor(logits), sampling, generator) for _ in range(4000)]
    return [drawn.count(token) / len(drawn) for token in range(len(logits))]


LOGITS = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()


def test_draws_follow_the_probabilities() -> None:
    assert shares(LOGITS) == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.03)
    squared = [0.01, 0.25, 0.09, 0.01]
    assert shares(LOGITS, temperature=0.5) == pytest.approx([x / sum(squared) for x in squared], abs=0.03)


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    assert shares(LOGITS, top_k=2) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(LOGITS, top_p=0.75) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(LOGITS, top_p=0.45) == [0, 1, 0, 0]


@pytest.mark.parametrize("text", ["plain", "naïve über", "漢字と🙂です", "a🙂🙂\u0301b", "end 🙂"])
def test_characters_come_whole(text: str) -> None:
    pieces = list(stream(ByteTokenizer(), text.encode()))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text)


@pytest.mark.parametrize("garbage", [b"\xff\xfeab", b"\xf0\x9f\x99", b"a\xe6\xbc", b"\x80" * 9 + b"z"])
def test_bytes_that_are_no_text_do_not_stop_it(garbage: bytes) -> None:
    text = "".join(stream(ByteTokenizer(), garbage))
    assert text == garbage.decode("utf-8", "replace")


class Spaced:
    """Like many trained tokenizers: a space before every word but a text's first."""

    name, sha256, vocab_size, eos = "spaced", "", 4, 3

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


def test_spaces_between_tokens_survive() -> None:
    def tokens() -> Iterator[int]:
        yield from (0, 1, 2)

    assert list(stream(Spaced(), tokens())) == ["w0", " w1", " w2"]  # type: ignore[arg-type]


def test_a_terminal_obeys_no_model() -> None:
    assert show_controls("a\x1b[2J\tb\r\n\x07\x7f\x9b é漢") == "a␛[2J\tb␍\n␇␡\ufffd é漢"


def test_an_empty_prompt_starts_a_document() -> None:
    model = make_model(make_config(vocab_size=264))
    pieces = list(continue_text(model, ByteTokenizer(), SamplingConfig(prompt="", tokens=5)))
    assert 0 < len("".join(pieces)) <= 5


@pytest.mark.parametrize("changes", [{"tokens": -1}, {"temperature": -0.5}, {"top_k": 0}, {"top_p": 0.0}])
def test_configuration_rules(changes: dict[str, float]) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{key}={value}"):
        SamplingConfig(**changes)  # type: ignore[arg-type]
