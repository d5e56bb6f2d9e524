"""A trained model as lm-eval's harness asks it: how likely texts are, and what it would write.

    (context, continuation) --> tokens of both together, cut off on the left at the longest sequence of the run
                            --> sum of log p(token | those before it) over the continuation; whether it is the likeliest

On one device. Sequences of similar length go together, filled up at the end, which no token before that sees; routing
drops nothing, so a token does not depend on its neighbours in the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from model.transformer import Transformer
from training.config import SamplingConfig
from training.data.tokenizer import Tokenizer
from training.generate import generate

LOGITS = 2**28  # held at once: 1 GiB in float32
LONGEST = 256  # tokens that are written where a task does not say how many


class HarnessModel(TemplateLM):
    """What ``lm_eval.simple_evaluate`` takes for a model."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, length: int) -> None:
        """``length``: tokens that the model sees at once."""
        super().__init__()
        self._model, self._tokens, self._length = model, tokenizer, length
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and what stands before a text without context."""
        return self._tokens.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens; none are added."""
        return [int(token) for token in self._tokens.encode(string)]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of (anything, context, continuation), in their order."""
        if (longest := max((len(continuation) for _, _, continuation in requests), default=0)) > self._length:
            raise ValueError(
                f"a task asks for {longest} tokens at once, and the model was trained on data.sequence_length="
                f"{self._length}: leave that task out"
            )
        rows = [(context + continuation)[-self._length - 1 :] for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for numbers in self._group(rows):
            logits = self._compute([rows[number][:-1] for number in numbers])
            for place, number in enumerate(numbers):
                count, stop = len(requests[number][2]), len(rows[number]) - 1
                labels = torch.tensor(rows[number][stop + 1 - count :], device=logits.device)
                answers[number] = _score(logits[place, stop - count : stop], labels)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, one window after another."""
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._length, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs)))
        return found

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to what the task calls an end."""
        return [self._write(*request.args) for request in requests]

    def _write(self, context: str, how: dict[str, Any]) -> str:
        count = int(how.get("max_gen_toks", LONGEST))
        sampling = SamplingConfig(
            tokens=count,
            temperature=float(how.get("temperature", 0.0)) if how.get("do_sample", False) else 0.0,
            top_k=how.get("top_k"),
            top_p=float(how.get("top_p", 1.0)),
        )
        ends = how.get("until", [])
        ends = [ends] if isinstance(ends, str) else ends
        prompt = self.tok_encode(context)[-max(1, self._length - count) :] or [self.eot_token_id]
        text, written = "", []
        for token in generate(self._model, prompt, sampling, self.eot_token_id):
            written.append(token)
            text = self._tokens.decode(written)
            if found := [place for end in ends if end and (place := text.find(end)) >= 0]:
                return text[: min(found)]
        return text

    def _group(self, rows: Sequence[list[int]]) -> Iterator[list[int]]:
        """Numbers of rows that are asked together, the longest first."""
        together: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
            if together and (len(together) + 1) * len(rows[together[0]]) * self._model.config.vocab_size > LOGITS:
                yield together
                together = []
            together.append(number)
        if together:
            yield together

    def _compute(self, rows: Sequence[list[int]]) -> Tensor:
        """Logits [B, S, V] of rows of tokens, filled up to the longest."""
        tokens = torch.full((len(rows), max(map(len, rows))), self.eot_token_id, dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
        return self._model.logits(tokens.to(self._device))


def _score(logits: Tensor, labels: Tensor) -> tuple[float, bool]:
    """Of labels [T] by logits [T, V]: the sum of their logarithms, and whether each is the likeliest."""
    likelihoods = logits.double().log_softmax(-1).gather(-1, labels[:, None])
    return float(likelihoods.sum()), bool((logits.argmax(-1) == labels).all())
