"""How fast data is read and made, as ratios measured in one run, interleaved, medians.

    loader       tokens/s of Batches.read, over what a model consumes (--need)
    tokenising   MB/s of `prepare`, over `tokenizers` alone on the same texts in memory, on one core and on
    all

The text is a part of the standard library's source (--megabytes), the tokenizer a byte-level BPE of 8192 tokens
trained on it first. `prepare` also starts its processes, reads the files, writes, syncs and verifies the token files.

    python benchmarks/data.py --need 10000 --megabytes 16 --rounds 5
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copyfile, rmtree
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from training.data.batches import Batches
from training.data.config import DataConfig
from training.data.corpus import find_sources, list_documents
from training.data.prepare import prepare

SHAPES = ((8, 256), (2, 1024), (8, 4096))  # sequences, length
READS = 200
VOCABULARY = 8192


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--need", type=float, default=10_000, help="tokens/s the model consumes")
    parser.add_argument("--megabytes", type=float, default=16, help="text to tokenise")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        texts = gather(Path(scratch) / "text", options.megabytes * 1e6)
        train_tokenizer(texts, Path(scratch) / "tokenizer.json")
        compare_loading(Path(scratch), options.need, options.rounds)
        compare_tokenising(Path(scratch), texts, options.rounds)


def gather(folder: Path, limit: float) -> list[str]:
    """Copies source files to ``folder``, every third, up to ``limit`` bytes; returns their texts."""
    folder.mkdir()
    (source,) = find_sources(["stdlib"])
    texts: list[str] = []
    size = 0
    for number, (_, document) in enumerate(list_documents((source,), 0.05)):
        if number % 3 == 0 and size + document.size <= limit:
            copy = folder / f"{number:05}.py"
            copyfile(source.root / document.path, copy)
            texts.append(copy.read_bytes().decode("utf-8", "replace"))
            size += document.size
    print(f"text: {len(texts)} files, {size / 1e6:.1f} MB")
    return texts


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Trains a byte-level BPE on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(path))


def interleave(rounds: int, variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each variant; every round runs them all, in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = perf_counter()
            run()
            times[name].append(perf_counter() - started)
    return {name: median(seconds) for name, seconds in times.items()}


def compare_loading(scratch: Path, need: float, rounds: int) -> None:
    """Prints the loader's speed over the model's need, at random places of the text."""
    found = prepare(configure(scratch, "bytes", 2), report=lambda line: None)
    variants: dict[str, Callable[[], object]] = {}
    for count, length in SHAPES:
        batches = Batches(found.train, sequence_length=length, lookahead=2, mask_documents=True)
        variants[f"{count}x{length}"] = partial(read_many, batches, count)
    for (count, length), seconds in zip(SHAPES, interleave(rounds, variants).values(), strict=True):
        speed = READS * count * length / seconds
        print(
            f"loader {count}x{length}: {seconds / READS * 1e3:.2f} ms a batch, {speed / 1e6:.1f} M tokens/s: "
            f"{speed / need:.0f}x the model's need of {need:,.0f}, {need / speed:.2%} of a step"
        )


def read_many(batches: Batches, count: int) -> None:
    """Reads READS batches of ``count`` sequences."""
    for i in range(READS):
        batches.read(i * count, count)


def compare_tokenising(scratch: Path, texts: list[str], rounds: int) -> None:
    """Prints the speed of `prepare` over that of `tokenizers` alone, on one core and on all; and of bytes."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    path = str(scratch / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    cores = len(os.sched_getaffinity(0))

    def alone(workers: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def ours(name: str, workers: int) -> None:
        rmtree(scratch / "data", ignore_errors=True)
        prepare(configure(scratch, name, workers), report=lambda line: None)

    variants: dict[str, Callable[[], object]] = {}
    for workers in sorted({1, cores}):
        variants[f"tokenizers alone, {workers} cores"] = partial(alone, workers)
        variants[f"prepare, {workers} cores"] = partial(ours, path, workers)
        variants[f"prepare bytes, {workers} cores"] = partial(ours, "bytes", workers)
    seconds = interleave(rounds, variants)
    for workers in sorted({1, cores}):
        reference = seconds[f"tokenizers alone, {workers} cores"]
        made = seconds[f"prepare, {workers} cores"]
        print(
            f"tokenising on {workers} cores: prepare {size / made:.2f} MB/s, tokenizers alone {size / reference:.2f} "
            f"MB/s: {reference / made:.2f}x;  bytes {size / seconds[f'prepare bytes, {workers} cores']:.1f} MB/s"
        )


def configure(scratch: Path, tokenizer: str, workers: int) -> DataConfig:
    """The configuration of a comparison."""
    return DataConfig(
        sequence_length=256,
        corpus=(str(scratch / "text"),),
        tokenizer=tokenizer,
        folder=str(scratch / "data"),
        workers=workers,
    )


if __name__ == "__main__":
    main()
