"""The configuration seen as a flat table of dotted keys, and the presets found beside it. Standard library only.

    model.moe.experts -> Key(kind=int, optional=False, default=0)
    {"model": ("deepseek_v2_lite", "deepseek_v3", "small", "tiny"), "run": (...)}

Help, completion and error messages read this table, so that none of them loads Hydra or torch.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

PRESETS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True, slots=True)
class Key:
    """One field of the configuration."""

    owner: type  # the dataclass that declares it
    kind: Any  # its annotation, without "| None"
    optional: bool
    default: Any  # dataclasses.MISSING: a value has to come from a preset or the command line

    @property
    def rule(self) -> str:
        """What a value has to be, to follow the value in a message."""
        return f"must be {_describe(self.kind)}{' or null' if self.optional else ''}"

    @property
    def maps(self) -> bool:
        """Whether it is a mapping, from names that are not known here."""
        return get_origin(self.kind) is dict

    @property
    def values(self) -> tuple[str, ...]:
        """Every value there is, for enumerations and truth values; otherwise nothing."""
        kind = get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind
        if kind is bool:
            return ("true", "false")
        return tuple(member.name for member in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()

    def hint(self, raw: str) -> str:
        """``"; did you mean ...?"`` for a value ``raw`` that does not fit, or nothing."""
        if get_origin(self.kind) is tuple and not raw.startswith("["):
            return f"; did you mean [{raw}]?"
        if self.kind is int and re.fullmatch(r"\d+(\.0*)?(e\+?\d{1,2})?", raw) and float(raw).is_integer():
            return f"; did you mean {int(float(raw))}?"
        return nearest(raw.strip("[]"), self.values)


def table(schema: Any) -> dict[str, Key]:
    """Every leaf of the dataclass ``schema`` by dotted key, in the order of declaration."""
    return dict(_walk(schema, ""))


def kinds(schema: Any) -> dict[str, Any]:
    """The fields of the dataclass ``schema`` and what they hold, ``| None`` left out."""
    hints = get_type_hints(schema)
    return {field.name: _strip_none(hints[field.name])[0] for field in fields(schema)}


def groups(*folders: Path) -> dict[str, tuple[str, ...]]:
    """The names of the presets in each group: the YAML files in each subfolder of ``folders``."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/**/*.yaml")):
            group, _, name = path.relative_to(folder).with_suffix("").as_posix().partition("/")
            found.setdefault(group, []).append(name)
    return {group: tuple(names) for group, names in sorted(found.items())}


def nearest(word: str, names: Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the names closest to ``word``, or nothing where none is close.

    ``steps`` stands for ``run.steps``: the last part of a dotted name is compared as well.
    """
    names = list(names)
    tails = {name: name.rsplit(".", 1)[-1] for name in names}
    close = get_close_matches(word, names, n=1, cutoff=0.8)
    close = close or [name for name in names if tails[name] == word.rsplit(".", 1)[-1]][:3]
    if not close and "." not in word:
        similar = get_close_matches(word, tails.values(), n=1, cutoff=0.7)
        close = [name for name in names if tails[name] in similar][:3]
    close = close or get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _walk(schema: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        kind, optional = _strip_none(hints[field.name])
        if is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield prefix + field.name, Key(schema, kind, optional, default)


def _strip_none(hint: Any) -> tuple[Any, bool]:
    """``int | None`` -> ``int, True``."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0], True) if NoneType in get_args(hint) else (hint, False)


def _describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list in brackets, each {_describe(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"a mapping in braces, each value {_describe(get_args(kind)[1])}"
    if issubclass(kind, Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]
