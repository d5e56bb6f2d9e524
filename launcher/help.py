"""The texts of ``--help``, made from the same tables that parsing and completion use.

shoestring --help           the verbs, the presets, the flags, a few commands to start from
shoestring VERB --help      what the verb does, its keys with type, default and meaning
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING
from importlib import import_module
from typing import Any

from configs.schema import RunConfig
from launcher import keys

FLAGS = {
    "--multirun, -m": "run every combination of the values given: optimizer.lr=1e-3,3e-3 run.seed=range(0,3)",
    "--dry-run": "of submit: print the script of the job and what Slurm says to it; nothing is submitted or written",
    "--cfg job": "print the composed configuration and stop",
    "--config-dir DIR": "take presets from DIR as well: DIR/run/mine.yaml is run=mine",
    "--help, -h": "print help on a verb",
    "--version": "print the version",
}
EXAMPLES = {
    "shoestring train": "train the preset tiny on the source of the running Python",
    "shoestring train run=small optimizer.lr=1e-3 run.steps=500": "another preset, two values changed",
    "shoestring train --multirun run.seed=1,2,3": "three runs, one after the other",
    "shoestring train run=small --cfg job": "see what would run",
    "shoestring submit run=small cluster=slurm cluster.nodes=2 run.global_batch=16 run.micro_batch=1": (
        "a job of Slurm's: 16 ranks"
    ),
    "shoestring params run=deepseek_v3": "parameters and FLOPs without building the model",
    "shoestring layout run=small parallel.dp=4 parallel.tp=2 parallel.ep=4": "who is in which group of ranks",
    "shoestring schedule name=zb_h1 ranks=4 microbatches=8": "what each rank of a pipeline does when",
    'eval "$(shoestring completion bash)"': "complete verbs, presets, keys and values (also zsh, fish)",
}
COMMENT = re.compile(r"^ {4}(\w+):.*? {2}# (.*)$", re.MULTILINE)


def overview(verbs: Mapping[str, str]) -> str:
    """The text of ``shoestring --help``; ``verbs`` maps names to modules."""
    summaries = {name: import_module(module).SUMMARY for name, module in verbs.items()}
    lines = ["usage: shoestring VERB [KEY=VALUE ...] [FLAG ...]", ""]
    lines += ["verbs", *_columns(summaries), "", *_list_presets(), "", "flags", *_columns(FLAGS), ""]
    lines += ["examples", *(f"  {command}\n      {meaning}" for command, meaning in EXAMPLES.items()), ""]
    lines += ["keys: shoestring train --help"]
    return "\n".join(lines)


def describe(verb: str, module: Any) -> str:
    """The text of ``shoestring VERB --help``."""
    words = "".join(f" <{name}>" for name in getattr(module, "ARGUMENTS", ()))
    words += "".join(f" [<{name}>]" for name in getattr(module, "OPTIONAL", ()))
    schema = getattr(module, "Config", RunConfig)
    lines = [f"usage: shoestring {verb}{words}" + (" [KEY=VALUE ...] [FLAG ...]" if schema else ""), ""]
    lines += [module.SUMMARY, ""]
    if schema is RunConfig:
        flags = {flag: meaning for flag, meaning in FLAGS.items() if flag != "--version"}
        lines += [*_list_presets(), "", "flags", *_columns(flags), ""]
    if hasattr(module, "Keys"):
        lines += ["keys of its own, with their defaults", *_list_keys(module.Keys), ""]
    if schema:
        lines += ["keys, with their defaults (every preset sets those that have none)", *_list_keys(schema)]
    return "\n".join(lines).rstrip()


def _list_presets() -> list[str]:
    presets = {f"{group}=": " | ".join(names) for group, names in keys.groups(keys.PRESETS).items()}
    return ["presets (run= chooses the model as well)", *_columns(presets)]


def _list_keys(schema: type) -> list[str]:
    """Two columns: key with its default, and type with meaning."""
    table = keys.table(schema)
    comments = {owner: _read_comments(owner) for owner in {key.owner for key in table.values()}}
    rows = {}
    for name, key in table.items():
        value = "" if key.default is MISSING else _write(key.default)
        comment = comments[key.owner].get(name.rpartition(".")[2])
        rows[f"{name}={value}"] = "; ".join(filter(None, (key.rule.removeprefix("must be "), comment)))
    return _columns(rows)


def _read_comments(owner: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, inherited ones included: its one description, in the source."""
    sources = (inspect.getsource(kind) for kind in reversed(owner.__mro__[:-1]))
    return {name: comment for source in sources for name, comment in COMMENT.findall(source)}


def _write(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {left:<{width}}  {right}".rstrip() for left, right in rows.items()]
