"""The command ``shoestring``: a table of verbs, each a module that is imported only when its verb is called.

A verb's module declares ``SUMMARY`` (a line for ``--help``), ``run(config, invocation) -> int`` and, where its input is not
a run's configuration, ``Config``, a dataclass of its own.
"""

import sys
from importlib import import_module

VERBS = {
    "train": "launcher.train",
    "params": "launcher.params",
    "prepare": "launcher.prepare",
    "generate": "launcher.generate",
    "export": "launcher.export",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: the process's own) and returns its exit code: 0, 1 or, for mistakes, 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(words)
    except ValueError as error:
        print(f"shoestring: {error}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    from launcher import compose

    if not words or words[0] not in VERBS:
        raise ValueError(f"verb must be one of {', '.join(VERBS)}")
    verb, *rest = words
    module = import_module(VERBS[verb])
    overrides = tuple(word for word in rest if "=" in word)
    arguments = tuple(word for word in rest if "=" not in word)
    schema = getattr(module, "Config", None)
    config, yaml = compose.compose(overrides) if schema is None else compose.compose_plain(schema, overrides)
    return int(module.run(config, compose.Invocation(verb, arguments, overrides, yaml)))
