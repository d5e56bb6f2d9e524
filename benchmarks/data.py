"""How fast data is read and made, as ratios measured in one run, interleaved, medians.

    loader       tokens/s of Batches.read, over what a model consumes (--need)
    tokenising   MB/s of `prepare`, over `tokenizers` alone on the same texts in memory, on one core and on
    all
    records      the same of the texts as JSONL, in one file
    starting     seconds until a set of a billion tokens, of files of zeros that take no room, gives its first batch

The text is Python's source, of the standard library and of what is installed, a part of it (--megabytes), the tokenizer
a byte-level BPE of 8192 tokens trained on it first. `prepare` also starts its processes, reads the files, writes, syncs
and verifies the token files: a third of a second that a small text does not outlast.

    python benchmarks/data.py --need 10000 --megabytes 48 --rounds 5
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copyfile, rmtree
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from training.data.batches import Batches
from training.data.config import DataConfig
from training.data.corpus import find_sources, list_documents
from training.data.index import Index, write_index
from training.data.prepare import prepare
from training.data.tokenizer import load_tokenizer
from training.data.tokens import Shard

SHAPES = ((8, 256), (2, 1024), (8, 4096))  # sequences, length
READS = 200
VOCABULARY = 8192


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--need", type=float, default=10_000, help="tokens/s the model consumes")
    parser.add_argument("--megabytes", type=float, default=48, help="text to tokenise")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        texts = gather(Path(scratch) / "text", options.megabytes * 1e6)
        train_tokenizer(texts, Path(scratch) / "tokenizer.json")
        compare_loading(Path(scratch), options.need, options.rounds)
        compare_tokenising(Path(scratch), texts, options.rounds)
        time_start(Path(scratch), options.rounds)


def gather(folder: Path, limit: float) -> list[str]:
    """Copies source files to ``folder``, every third, up to ``limit`` bytes; returns their texts."""
    folder.mkdir()
    sources = find_sources(["stdlib", sysconfig.get_path("purelib")])
    texts: list[str] = []
    size = 0
    for number, (_, document) in enumerate(list_documents(sources, 0.05)):
        if number % 3 == 0 and size + document.size <= limit and document.path.endswith(".py"):
            copy = folder / f"{number:05}.py"
            copyfile(sources[document.source].root / document.path, copy)
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

    def ours(name: str, workers: int, kind: str = "text") -> None:
        rmtree(scratch / "data", ignore_errors=True)
        prepare(configure(scratch, name, workers, kind), report=lambda line: None)

    variants: dict[str, Callable[[], object]] = {}
    write_records(scratch / "records" / "all.jsonl", texts)
    for workers in sorted({1, cores}):
        variants[f"tokenizers alone, {workers} cores"] = partial(alone, workers)
        variants[f"prepare, {workers} cores"] = partial(ours, path, workers)
        variants[f"prepare bytes, {workers} cores"] = partial(ours, "bytes", workers)
        variants[f"records, {workers} cores"] = partial(ours, path, workers, "records")
    seconds = interleave(rounds, variants)
    for workers in sorted({1, cores}):
        reference = seconds[f"tokenizers alone, {workers} cores"]
        made, records = (seconds[f"{what}, {workers} cores"] for what in ("prepare", "records"))
        bytes_alone = size / seconds[f"prepare bytes, {workers} cores"]
        print(
            f"tokenising on {workers} cores: prepare {size / made:.2f} MB/s, tokenizers alone {size / reference:.2f} "
            f"MB/s: {reference / made:.2f}x;  of JSONL {reference / records:.2f}x;  bytes {bytes_alone:.1f} MB/s"
        )


def write_records(path: Path, texts: list[str]) -> None:
    """A file of a record a line."""
    path.parent.mkdir()
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


START = """
import sys
from time import perf_counter
started = perf_counter()
import torch
loaded = perf_counter() - started
from training.data.batches import Batches
from training.data.config import DataConfig
from training.data.prepare import prepare
found = prepare(DataConfig(sequence_length=4096, corpus=(sys.argv[1],), verify_gigabytes=float(sys.argv[2])))
Batches(found.train, sequence_length=4096, lookahead=2, mask_documents=True).read(0, 8)
print(perf_counter() - started, loaded)
"""


def time_start(scratch: Path, rounds: int) -> None:
    """Prints seconds from a new process to the first batch of a billion tokens, with checksums and without."""
    folder = scratch / "billion"
    make_sparse(folder, 10**9)
    variants = {"sizes checked": "0", "checksums too": "16"}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, gigabytes in variants.items():
            began = perf_counter()
            command = [sys.executable, "-c", START, str(folder), gigabytes]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[name].append((perf_counter() - began, *map(float, said.split())))
    for name, found in times.items():
        whole, inside, torch_alone = (median(each) for each in zip(*found, strict=True))
        print(
            f"starting on 1.0 B tokens, {name}: {inside:.2f} s, of which torch's own import {torch_alone:.2f} s; with "
            f"Python's start {whole:.2f} s"
        )


def make_sparse(folder: Path, tokens: int) -> None:
    """Token files of zeros, documents of a thousand tokens, as `prepare` would have made them of a corpus."""
    folder.mkdir()
    splits = {"train": [tokens // 8] * 8, "held_out": [tokens // 1000]}
    made = {
        split: [write_zeros(folder / f"{split}-{number:05d}.tokens", count) for number, count in enumerate(counts)]
        for split, counts in splits.items()
    }
    byte = load_tokenizer("bytes")
    identity = {"tokenizer": {"name": byte.name, "sha256": byte.sha256}, "held_out": 0.05}
    write_index(folder, Index([], identity, "<u2", byte.eos, made))


def write_zeros(path: Path, count: int) -> Shard:
    """A shard of ``count`` zeros, whose part of the file is a hole."""
    starts, size = np.arange(0, count, 1000, dtype="<u8").tobytes(), -(-count * 2 // 8) * 8
    crc, zeros = 0, bytes(1 << 24)
    for start in range(0, size, len(zeros)):
        crc = zlib.crc32(zeros[: size - start], crc)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(starts)
    return Shard(path.name, count, len(starts) // 8, 2 * count, 0, zlib.crc32(starts, crc))


def configure(scratch: Path, tokenizer: str, workers: int, kind: str = "text") -> DataConfig:
    """The configuration of a comparison."""
    return DataConfig(
        sequence_length=256,
        corpus=(str(scratch / kind),),
        tokenizer=tokenizer,
        folder=str(scratch / "data"),
        workers=workers,
    )


if __name__ == "__main__":
    main()
