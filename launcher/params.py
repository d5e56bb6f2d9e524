"""``shoestring params``: how large a model is and what a token costs, computed from the configuration alone."""

import sys

from configs.schema import RunConfig
from launcher import cli
from launcher.invocation import Invocation
from model.config import ModelConfig
from model.count import Amount, Parameters, count, flops_per_token, forward_flops, without_mtp
from training.ramp import schedule_batches

SUMMARY = "print the parameters of a model by part, and its FLOPs per token"
COLUMNS = ("part", "total", "active", "multiplied")
OPERATIONS = "YZEPTGM"  # prefixes of powers of ten, where parameters and tokens are counted in T, B and M


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints the table: rich in a terminal, aligned columns of plain text anywhere else."""
    rows = lay_out(count(config.model), depth=config.model.mtp.depth)
    title = f"{config.model.name}: parameters"
    if sys.stdout.isatty():
        _print_rich(title, rows)
    else:
        _print_plain(title, rows)
    print("\n".join(describe_cost(config)))
    return 0


def lay_out(parameters: Parameters, depth: int) -> list[tuple[str, str, str, str]]:
    """The rows of the table: parts, their sum, and what MTP adds."""
    names = {
        "embedding": parameters.embedding,
        "attention": parameters.attention,
        "dense mlp": parameters.dense,
        "router": parameters.router,
        "shared experts": parameters.shared,
        "routed experts": parameters.routed,
        "norms": parameters.norms,
        "head": parameters.head,
        "model": parameters.main,
    }
    if depth:
        names |= {f"MTP, depth {depth}": parameters.mtp, "model with MTP": parameters.trained}
    return [(name, *_write(amount)) for name, amount in names.items()]


def describe_cost(config: RunConfig) -> list[str]:
    """Lines on operations: a token's, forward and training, without and with MTP, and the whole run's."""
    model, length = config.model, config.data.sequence_length
    lines = [f"a token, in sequences of {length}: {_write_cost(without_mtp(model), length)}"]
    if model.mtp.depth:
        lines.append(f"a token, with MTP: {_write_cost(model, length)}")
    tokens = schedule_batches(config.run, length).before(config.run.steps) * length
    total = scale(tokens * flops_per_token(model, length), OPERATIONS)
    lines.append(f"run {config.run.name}: {config.run.steps} steps, {scale(tokens)} tokens, {total}FLOP")
    return lines


def scale(value: float, prefixes: str = "TBM") -> str:
    """A number with the prefix that fits: 671026404352 -> ``671.03 B``; ``prefixes`` from the largest down to 1e6."""
    for place, prefix in enumerate(prefixes):
        unit = 1e6 * 1000 ** (len(prefixes) - 1 - place)
        if value >= unit:
            return f"{value / unit:,.2f} {prefix}"
    return f"{value:,.0f}"


def _write(amount: Amount) -> tuple[str, str, str]:
    return scale(amount.total), scale(amount.active), scale(amount.multiplied)


def _write_cost(model: ModelConfig, length: int) -> str:
    forward, training = forward_flops(model, length), flops_per_token(model, length)
    return f"forward {scale(forward, OPERATIONS)}FLOP, training {scale(training, OPERATIONS)}FLOP"


def _print_rich(title: str, rows: list[tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("model") else "", end_section=row[0] in ("head", "model"))
    Console().print(table)


def _print_plain(title: str, rows: list[tuple[str, str, str, str]]) -> None:
    print(title)
    for row in [COLUMNS, *rows]:
        print(f"{row[0]:<16}" + "".join(f"{cell:>12}" for cell in row[1:]))


if __name__ == "__main__":
    sys.exit(cli.main(["params", *sys.argv[1:]]))
