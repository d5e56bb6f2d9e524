"""Our model as lm-eval's harness asks it, against the harness' own adapter of `transformers` on the same weights."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from family_models import make_qwen_moe
from published_models import EAGER
from small_models import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.huggingface import Resident, export
from training import harness
from training.config import SamplingConfig
from training.data.tokenizer import load_tokenizer
from training.generate import generate
from training.harness import HarnessModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

END = "<|endoftext|>"
LENGTH = 24  # tokens that a model sees at once
TEXTS = ("the quick brown fox", "jumps over", "the lazy dog", " naïve 漢字", "quick quick brown", "", "x", "dog " * 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, Any]:
    """Ours and theirs."""
    folder = tmp_path_factory.mktemp("harness")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 5, trainer)
    inner.save(str(folder / "tokenizer.json"))
    config = make_qwen_moe(vocab_size=300, init_std=0.4)
    model = make_model(config, torch.float32)
    for router in model.routers():
        router.bias.zero_()
    export(Resident(model), config, folder / "model", eos=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **EAGER)
        words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=END)
        other = HFLM(pretrained=theirs, tokenizer=words, max_length=LENGTH, batch_size=3, device="cpu")
    return HarnessModel(model, load_tokenizer(str(folder / "tokenizer.json")), LENGTH), other


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_likelihoods_are_those_of_the_harness_own_adapter(pair: tuple[HarnessModel, Any]) -> None:
    """Contexts that are empty, end in a space or are longer than the model; continuations that are, too."""
    ours, theirs = pair
    asked = [(context, continuation) for context in TEXTS for continuation in TEXTS[:5]]
    asked += [("the quick ", "brown fox"), ("dog " * 40, "dog dog")]
    requests = ask("loglikelihood", *asked)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    for text, (one, best), (two, likeliest) in zip(asked, found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-4) and best == likeliest, text
    # A continuation that is the likeliest is said to be that, and one that ends otherwise is not.
    prompt = ours.tok_encode("the quick")
    best = list(generate(ours._model, prompt, SamplingConfig(tokens=4, temperature=0), stop=-1))
    other = [*best[:-1], (best[-1] + 1) % 300]
    answers = ours._loglikelihood_tokens([(None, prompt, best), (None, prompt, other)])
    assert [likeliest for _, likeliest in answers] == [True, False]


def test_more_than_the_model_sees_is_refused(pair: tuple[HarnessModel, Any]) -> None:
    with pytest.raises(ValueError, match=r"asks for \d+ tokens at once.* data.sequence_length=24"):
        pair[0].loglikelihood(ask("loglikelihood", ("the quick", TEXTS[-1])), disable_tqdm=True)


def test_rows_of_any_length_go_together(pair: tuple[HarnessModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ask("loglikelihood", *((text, "brown fox") for text in TEXTS))
    together = pair[0].loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(harness, "LOGITS", 1)
    alone = pair[0].loglikelihood(requests, disable_tqdm=True)
    for (one, best), (two, likeliest) in zip(together, alone, strict=True):
        assert one == pytest.approx(two, rel=1e-5) and best == likeliest


def test_whole_texts_in_windows(pair: tuple[HarnessModel, Any]) -> None:
    requests = ask("loglikelihood_rolling", *((text,) for text in TEXTS if text))
    expected = pair[1].loglikelihood_rolling(requests, disable_tqdm=True)
    found = pair[0].loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 7


def test_what_it_writes(pair: tuple[HarnessModel, Any]) -> None:
    how = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    requests = ask("generate_until", *((text, dict(how)) for text in TEXTS if text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pair[1].generate_until(requests, disable_tqdm=True)
    assert pair[0].generate_until(requests, disable_tqdm=True) == expected
    # An end is not part of it, nor what follows.
    whole = max(expected, key=len)
    text = [request.args[0] for request in requests][expected.index(whole)]
    end = whole[len(whole) // 2 :][:2]
    (cut,) = pair[0].generate_until(ask("generate_until", (text, {"until": end, "max_gen_toks": 9})))
    assert cut == whole[: whole.index(end)]
