"""What Hydra, OmegaConf and YAML complain about, said in one or two lines with the dotted key, the value and the rule.

    Value 'many' of type 'str' could not be converted to Integer
        full_key: run.steps                                    ->   run.steps=many must be an integer (in run/mine.yaml)
        reference_type=RunSection

Mistakes on the command line are found before Hydra sees them (launcher/compose.py); what arrives here comes mostly from
the files of a user's own presets.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError, YAMLError

from launcher.keys import Key, nearest

_VALUE = re.compile(
    r"^(?:Value|\w+ value) '(.*?)'(?: of type|, expected| for field)|value: (.*)$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"^In '(.+?)'")


@contextmanager
def explained(
    table: Mapping[str, Key],
    groups: Mapping[str, tuple[str, ...]] | None = None,
    others: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turns the libraries' exceptions into a ``ValueError`` in our words, given the known keys and presets.

    ``others``: Hydra's own, where it is at work. Ranks only read a file, and do without it.
    """
    try:
        yield
    except (OmegaConfBaseException, YAMLError, ValueError, *others) as error:
        raise ValueError(explain(error, table, groups or {})) from None


def explain(error: BaseException, table: Mapping[str, Key], groups: Mapping[str, tuple[str, ...]]) -> str:
    """One line, at most two, on what is wrong."""
    if isinstance(error, ValueError) and not isinstance(error, OmegaConfBaseException):
        return str(error)
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, MarkedYAMLError):
            return _explain_yaml(cause)
        if isinstance(cause, YAMLError):
            return f"not YAML: {' '.join(str(cause).split())}"
        if missing := getattr(cause, "missing_cfg_file", None):  # Hydra's MissingConfigException
            group, _, name = missing.rpartition("/")
            names = groups.get(group, ())
            return f"{group}={name} must be one of {', '.join(names)}{nearest(name, names)}{_file(chain)}"
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _explain_key(cause, table) + _file(chain)
    return _explain_merge(str(error), _file(chain))


def explain_word(word: str) -> str:
    """What is wrong with a word of the command line that cannot be read as ``key=value``."""
    key, sign, value = word.partition("=")
    if not sign:
        return f"{word} must be written as key=value"
    if not re.fullmatch(r"[+~]{0,2}[\w@/:.-]+", key) or ".." in key:
        return f"{word}: {key or 'nothing'} is not a key; keys look like run.steps"
    return (
        f"{key}={value} cannot be read: close every bracket and quote, and put a value with spaces, brackets or commas "
        f"""in quotes of its own, as in '{key}="..."'"""
    )


def _explain_key(error: OmegaConfBaseException, table: Mapping[str, Key]) -> str:
    key = re.sub(r"\[\d+\]$", "", str(error.full_key))
    message = str(error.msg or error).split("\n    full_key")[0]
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        lost = key.startswith("run.") and any(name.startswith(key[4:] + ".") for name in table)
        hint = "; a preset of the group run opens with the line '# @package _global_'" if lost else nearest(key, table)
        return f"{key}: there is no such key{hint}"
    if isinstance(error, InterpolationResolutionError):
        section: Any = OmegaConf.to_container(error.parent_node, resolve=False)
        value = section[error.key]
        reason = message.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        return f"{key}={value} cannot be resolved: {reason}"
    if not isinstance(error, ValidationError):
        return f"{key}: {message}"
    found = _VALUE.search(message)
    value = next(filter(None, found.groups()), "") if found else "None"
    value = "null" if value == "None" else value
    if key in table:
        return f"{key}={value} {table[key].rule}{table[key].hint(value)}"
    inside = next((name for name in table if name.startswith(f"{key}.")), "run.steps")
    return f"{key}={value} must be a section with keys of its own, for example {inside}"


def _explain_merge(message: str, file: str) -> str:
    """What is left: a file of the wrong shape, which Hydra reports without a key."""
    shape = re.search(r"is not a subclass of (\w+)\. value: (.*)", message)
    if shape:
        return f"{shape[2]} stands where the keys of a section belong ({shape[1]}){file}"
    if "Cannot merge DictConfig with ListConfig" in message:
        return f"a preset must hold keys and values, not a list{file}"
    return " ".join(message.split("\n")[:2])


def _explain_yaml(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name} line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
    return f"{place} is not YAML: {error.problem or error.context}"


def _file(chain: list[BaseException]) -> str:
    """`` (in run/mine.yaml)`` where an exception of the chain says so."""
    for cause in chain:
        found = _FILE.match(str(cause))
        if found:
            return f" (in {found[1]}.yaml)"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
