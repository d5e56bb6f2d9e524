"""What placing experts by load gains on skewed loads, at DeepSeek-V3's size, and what it costs to compute.

    fullest / mean     load of the fullest rank over the mean of all: an expert layer takes as long as its fullest rank
    of the bound       fullest over what no placement of the same replicas beats: the mean, or the heaviest replica
                       in the company of the lightest
    moved              experts whose rank changes from 0, 1, 2, ..: what a permutation costs when it is applied
    nodes              that a token touches under node-limited routing, mean and most (one layer, tokens drawn)
    ms a layer         median time of computing the placement of one layer, one core

Loads follow Zipf's law (expert of place i: 1 / i^skew), placed at random in each layer. Everything is seeded.

    python benchmarks/balance.py --layers 61 --experts 256 --ranks 64
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from time import perf_counter

import numpy as np
import torch

from model.config import MoEConfig
from model.router import choose
from parallel.balance import Floats, Ints, carried, permutation, replicas
from parallel.locality import count, look

SKEWS = (0.1, 0.25, 0.5, 1.0)
TOKENS, TOP_K, TOP_GROUPS = 4096, 8, 4
ROW_BYTES = 2 * 7168
Place = Callable[[Floats], Ints]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=8, help="also the number of expert groups")
    parser.add_argument("--spare", type=int, default=64, help="slots for more replicas, serving only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    experts, ranks, nodes = options.experts, options.ranks, options.nodes
    slots = experts + options.spare
    placements: dict[str, Place] = {
        "as numbered": lambda load: np.arange(len(load)),
        "permutation": partial(permutation, ranks=ranks),
        "permutation, groups kept": partial(permutation, ranks=ranks, groups=nodes, nodes=nodes),
        f"{slots} replicas": lambda load: replicas(load, slots, ranks).experts,
        f"{slots} replicas, groups kept": lambda load: replicas(load, slots, ranks, nodes, nodes).experts,
    }
    print(f"{options.layers} layers, {experts} experts, {ranks} ranks, {nodes} nodes and groups; mean over the layers")
    random = np.random.default_rng(options.seed)
    for skew in SKEWS:
        loads = [random.permutation(np.arange(1, experts + 1) ** -skew) for _ in range(options.layers)]
        print(f"\nskew {skew:<4}: {'':25} fullest / mean   before / after   of the bound   moved   ms a layer")
        for name, place in placements.items():
            compare(name, place, loads, ranks)
    show_nodes(
        placements,
        MoEConfig(experts=experts, top_k=TOP_K, ffn=1, groups=nodes, top_groups=min(TOP_GROUPS, nodes)),
        ranks,
    )


def compare(name: str, place: Place, loads: list[Floats], ranks: int) -> None:
    """Prints one line: ``place`` on every layer's load."""
    seconds, fullest, before, reached, moved = [], [], [], [], []
    for load in loads:
        started = perf_counter()
        order = place(load)
        seconds.append(perf_counter() - started)
        even = load.sum() / ranks
        rank_of = np.arange(len(load)) // (len(load) // ranks)
        fullest.append(carried(load, order, ranks).max() / even)
        before.append(carried(load, np.arange(len(load)), ranks).max() / even)
        share = np.sort((load / np.bincount(order, minlength=len(load)))[order])
        bound = share[-1] + share[: len(order) // ranks - 1].sum()
        reached.append(fullest[-1] / max(1, bound / even))
        if len(order) == len(load):
            moved.append(float((rank_of[order.argsort()] != rank_of).mean()))
    gain = mean(b / f for b, f in zip(before, fullest, strict=True))
    share_moved = f"{mean(moved):7.0%}" if moved else f"{'':7}"
    figures = f"{mean(fullest):14.3f} {gain:15.2f}x {mean(reached):13.3f}x {share_moved} {median(seconds) * 1e3:12.2f}"
    print(f"  {name:35} {figures}")


def show_nodes(placements: dict[str, Place], moe: MoEConfig, ranks: int) -> None:
    """Prints how many nodes tokens touch under each permutation, and what one dispatch of rank 0 moves."""
    generator = torch.Generator().manual_seed(0)
    skew = 0.5 * torch.randn(moe.experts, generator=generator)
    experts = choose(torch.sigmoid(torch.randn(TOKENS, moe.experts, generator=generator) + skew), moe)
    load = torch.bincount(experts.flatten(), minlength=moe.experts).double().numpy()
    limit = f"top {moe.top_k} within {moe.top_groups} of {moe.groups} groups"
    print(f"\n{TOKENS} tokens of one rank, {limit}, {ROW_BYTES} bytes a row")
    for name, place in placements.items():
        order = place(load)
        if len(order) == moe.experts:
            found = count(experts, look(torch.from_numpy(order), range(ranks), 0, ranks // moe.groups))
            inside, across = found.travelled(ROW_BYTES)
            once = int(found.entries) * ROW_BYTES
            print(
                f"  {name:25} nodes {found.mean_nodes():.2f}, most {found.max_nodes()};  MB across {across / 1e6:.0f} "
                f"({once / 1e6:.0f} if a token entered a node once), inside {inside / 1e6:.0f}"
            )


if __name__ == "__main__":
    main()
