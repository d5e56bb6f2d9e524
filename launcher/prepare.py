"""``shoestring prepare``: tokenises the text of ``data.*`` and checks every byte of the result.

Training does the same when it starts; this verb does it ahead, where there are cores and no accelerator waits. Run
again after an interruption, it continues; run again when all is done, it checks every checksum.
"""

import sys
from time import perf_counter

from configs.schema import RunConfig
from launcher import cli
from launcher.invocation import Invocation

SUMMARY = "tokenise text into token files that training reads; continues where it was interrupted"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prepares and prints what there is."""
    from training.data.listing import SPLITS
    from training.data.prepare import prepare

    started = perf_counter()
    found = prepare(config.data, thorough=True)
    shards = {split: found.shards.get(split, []) for split in SPLITS}
    text = {split: sum(shard.text_bytes for shard in shards[split]) for split in SPLITS}
    replaced = sum(shard.replaced for split in SPLITS for shard in shards[split])
    tokens = {"train": found.train, "held_out": found.held_out}
    for split in SPLITS:
        count, size = tokens[split].tokens, f"{text[split] / 1e6:>12,.1f} MB  " if found.shards else ""
        words = f"  {text[split] / max(1, count):.2f} bytes a token" if found.shards else ""
        print(f"{split:<9} {tokens[split].documents:>12,} documents  {size}{count:>16,} tokens{words}")
    if replaced:
        print(f"{replaced:,} characters are U+FFFD, the sign for bytes that are not UTF-8")
    print(f"tokenizer {found.tokenizer.name}, vocabulary {found.tokenizer.vocab_size:,}")
    if found.shards:
        print(f"checked   {found.verified / 1e6:,.1f} MB in {sum(map(len, shards.values())):,} files: all whole")
    else:
        print(f"checked   {found.verified / 1e6:,.1f} MB, read where they are: all tokens are of that vocabulary")
    print(f"{found.folder} is ready after {perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
