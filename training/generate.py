"""Text from a model, a token at a time: each new token meets a cache of those before it.

    logits [V] / temperature --> the top_k best --> the fewest that hold top_p of the probability --> draw

Temperature 0 takes the best token. Draws come from a CPU generator in float64, so a seed gives the same text on every
device whose logits are the same.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model.attention import Cache
from model.transformer import Transformer
from training.config import SamplingConfig
from training.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding makes of an incomplete character
LONGEST = 4  # tokens a character may be spread over: bytes of UTF-8
# Control characters, but for tab and line feed, as the pictures Unicode has for them (C1 controls as U+FFFD).
PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


@torch.no_grad()
def generate(model: Transformer, prompt: Sequence[int], sampling: SamplingConfig, stop: int) -> Iterator[int]:
    """Up to ``sampling.tokens`` tokens that follow ``prompt`` (not empty); ends before a token ``stop``."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = Cache()
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for _ in range(sampling.tokens):
        token = pick(model.logits(tokens, cache)[0, -1], sampling, generator)
        if token == stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def pick(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """A token drawn from ``logits`` [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, tokens = (logits.double().cpu() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = scores[: sampling.top_k].softmax(-1)
    # A token stays if those better than it hold less than top_p: the best one always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of ``tokens`` as they come, never a part of a character.

    Text is decoded with the tokens before it, because some tokenizers write a token differently at a text's start.
    """
    shown: list[int] = []  # already given out, the last few
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(shown + waiting)[len(tokenizer.decode(shown)) :]
        if text.endswith(REPLACEMENT) and len(waiting) < LONGEST:
            continue
        yield text
        shown, waiting = waiting, []
    if waiting:
        yield tokenizer.decode(shown + waiting)[len(tokenizer.decode(shown)) :]


def show_controls(text: str) -> str:
    """``text`` fit for a terminal, which would obey the escape sequences that a model may write."""
    return text.translate(PICTURES)


def continue_text(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig) -> Iterator[str]:
    """Pieces of the text that follows ``sampling.prompt``. An empty prompt starts a new document."""
    ids = [int(token) for token in tokenizer.encode(sampling.prompt)] or [tokenizer.eos]
    yield from stream(tokenizer, generate(model, ids, sampling, tokenizer.eos))
