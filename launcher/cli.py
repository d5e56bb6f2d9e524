"""The command ``shoestring``: a table of verbs, each a module that is imported only when its verb is called.

    shoestring VERB [ARGUMENT ...] [KEY=VALUE ...] [--multirun] [--cfg job] [--config-dir DIR] ...

A verb's module declares

    SUMMARY                             one line for --help
    run(config, invocation) -> int      does the work and returns the exit code
    ARGUMENTS                           names of its words without "=", if it takes any
    OPTIONAL                            names of those that may follow them
    Config                              a dataclass of its own, or None, if its input is not a run's configuration
    Keys                                a dataclass of what it takes beside a run's configuration, if it does
    run_all(jobs) -> int                instead of ``run`` for each: all of a --multirun at once

Exit codes: 0; 1 for a fault of ours, with its traceback; 2 for a user's mistake, in a line or two; 3 where a
machine is unfit for the run; 130 for Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from launcher.invocation import Invocation
from launcher.keys import nearest
from launcher.preflight.unfit import UNFIT, UnfitError

VERBS = {
    "train": "launcher.train",
    "submit": "launcher.submit",
    "status": "launcher.status",
    "logs": "launcher.follow",
    "cancel": "launcher.cancel",
    "runs": "launcher.runs",
    "report": "launcher.page.command",
    "enroll": "launcher.enroll",
    "preflight": "launcher.preflight.command",
    "params": "launcher.params",
    "layout": "launcher.layout",
    "schedule": "launcher.schedule",
    "verify": "launcher.verify",
    "validate": "launcher.validate",
    "tokenizer": "launcher.tokenizer",
    "prepare": "launcher.prepare",
    "generate": "launcher.generate",
    "eval": "launcher.evaluation.command",
    "export": "launcher.export",
    "upcycle": "launcher.upcycle",
    "checkpoint": "launcher.checkpoint",
    "torture": "launcher.torture",
    "checkpoint export": "launcher.checkpoint_export",
    "checkpoint import": "launcher.checkpoint_import",
    "kernels": "launcher.kernels",
    "completion": "launcher.completion",
}
MISTAKE = 2  # exit code
FLAGS = ("--multirun", "--dry-run", "--cfg", "--config-dir", "--help")
DRY = ("submit",)  # verbs that can say what they would do
ROOMS = ("launcher", "training", "parallel", "model", "configs")


@dataclass(slots=True)
class Words:
    """The words behind the verb, sorted."""

    arguments: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    dry_run: bool = False
    cfg: bool = False
    help: bool = False
    presets: Path | None = None  # the folder behind --config-dir


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: the process's own) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if not is_mistake(error):
            raise
        first, _, rest = str(error).partition("\n")
        print(f"shoestring: {first}" + (f"\n{' '.join(rest.split())}" if rest else ""), file=sys.stderr)
        return name_exit(error)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("shoestring: interrupted", file=sys.stderr)
        return 130


def name_exit(error: ValueError) -> int:
    """The exit code for a mistake of the user's, or for a machine that is unfit."""
    return UNFIT if isinstance(error, UnfitError) else MISTAKE


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        from launcher.help import overview

        print(overview(VERBS))
        return 0
    if words[0] == "--version":
        print(f"shoestring {version('shoestring')}")
        return 0
    verb = find(words)
    if verb not in VERBS:
        raise ValueError(f"{verb} is not a verb; the verbs are {', '.join(VERBS)}{nearest(verb, VERBS)}")
    module = import_module(VERBS[verb])
    given = sort(verb, words[len(verb.split()) :])
    if given.help:
        from launcher.help import describe

        print(describe(verb, module))
        return 0
    return _dispatch(verb, module, given)


def find(words: Sequence[str]) -> str:
    """The verb that ``words``, of which there is one at least, begin with: two of them, if that is a verb."""
    two = " ".join(words[:2])
    return two if two in VERBS else words[0]


def sort(verb: str, words: list[str]) -> Words:
    """Sorts the words behind ``verb`` into arguments, overrides and flags. ``ValueError`` for a flag that is none."""
    result = Words()
    rest = iter(words)
    for word in rest:
        flag, sign, value = word.partition("=")
        if flag in ("--cfg", "-c", "--config-dir"):
            value = value if sign else next(rest, "")
            if flag == "--config-dir":
                result.presets = Path(value)
            elif value == "job":
                result.cfg = True
            else:
                raise ValueError(f"{flag}={value} must be job: it prints the composed configuration and stops")
        elif word in ("--multirun", "-m"):
            result.multirun = True
        elif word == "--dry-run" and verb in DRY:
            result.dry_run = True
        elif word in ("--help", "-h"):
            result.help = True
        elif word.startswith("-"):
            raise ValueError(f"{word} is not a flag of {verb}; the flags are {', '.join(FLAGS)}{nearest(word, FLAGS)}")
        else:
            (result.overrides if sign or word.startswith("~") else result.arguments).append(word)
    return result


def _dispatch(verb: str, module: Any, words: Words) -> int:
    """Runs every job of the command line, one after the other, until one fails."""
    _check_arguments(verb, module, words)
    given, keys = _split(module, words)
    jobs = _compose(verb, module, given)
    presets = None if words.presets is None else str(words.presets)
    made = [
        (config, Invocation(verb, tuple(words.arguments), overrides, yaml, presets, keys, words.dry_run))
        for overrides, config, yaml in jobs
    ]
    if words.cfg:
        _print(made)
        return 0
    if hasattr(module, "run_all"):
        return int(module.run_all(made))
    for number, (config, invocation) in enumerate(made, start=1):
        if len(made) > 1:
            print(f"# job {number} of {len(made)}: {' '.join(invocation.overrides)}", flush=True)
        code = int(module.run(config, invocation))
        if code:
            return code
    return 0


def _print(jobs: list[tuple[Any, Invocation]]) -> None:
    for number, (_, invocation) in enumerate(jobs, start=1):
        if len(jobs) > 1:
            print(f"# job {number} of {len(jobs)}: {' '.join(invocation.overrides)}")
        print(invocation.yaml, end="" if number == len(jobs) else "---\n")


def _split(module: Any, words: Words) -> tuple[Words, Any]:
    """``words`` without those that are the verb's own ``Keys``, and these; None if it has none."""
    if not hasattr(module, "Keys"):
        return words, None
    from launcher.words import compose_plain

    names = {each.name for each in fields(module.Keys)}
    own = [word for word in words.overrides if word.partition("=")[0] in names]
    rest = [word for word in words.overrides if word not in own]
    return replace(words, overrides=rest), compose_plain(module.Keys, tuple(own))[0]


def _compose(verb: str, module: Any, words: Words) -> list[tuple[tuple[str, ...], Any, str]]:
    """Overrides, configuration and YAML of every job: a mistake in the last is found before the first starts."""
    overrides = tuple(words.overrides)
    own = getattr(module, "Config", RunConfig)
    if words.multirun and (own is not RunConfig or hasattr(module, "Keys")):
        raise ValueError(f"--multirun: {verb} takes no sweeps")
    if words.multirun:
        from launcher.discover import refuse

        refuse("--multirun", os.environ)
    if own is None:
        if overrides:
            raise ValueError(f"{overrides[0]}: {verb} takes no keys; see shoestring {verb} --help")
        return [((), None, "")]
    from launcher.compose import Composer  # Hydra takes a fifth of a second to load
    from launcher.words import compose_plain

    if own is not RunConfig:
        return [(overrides, *compose_plain(own, overrides))]
    composer = Composer(words.presets)
    jobs = composer.sweep(overrides) if words.multirun else [overrides]
    composed = [(job, *composer.compose(job)) for job in jobs]
    taken = [config.run.id for _, config, _ in composed if config.run.id is not None]
    if len(set(taken)) < len(taken):
        raise ValueError(
            f"run.id={taken[0]} names one run, --multirun starts {len(jobs)}: leave it out, or sweep it too"
        )
    return composed


def _check_arguments(verb: str, module: Any, words: Words) -> None:
    names = getattr(module, "ARGUMENTS", ())
    most = len(names) + len(getattr(module, "OPTIONAL", ()))
    if len(words.arguments) > most:
        extra = words.arguments[most]
        raise ValueError(f"{extra} must be written as key=value, for example run={extra}; see shoestring {verb} --help")
    if len(words.arguments) < len(names):
        raise ValueError(f"{verb} needs {' '.join(f'<{name}>' for name in names)}; see shoestring {verb} --help")


def is_mistake(error: ValueError) -> bool:
    """Whether ``error`` was raised by our own rooms, which speak to the user in it; a library's is a fault of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    source = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    root = Path(__file__).parents[1]
    return source.is_relative_to(root) and source.relative_to(root).parts[0] in ROOMS


if __name__ == "__main__":
    sys.exit(main())
