"""From words on the command line to a typed configuration: the only file that sees Hydra and OmegaConf.

    words -> overrides, each checked against the schema -> one composed tree -> RunConfig (a plain dataclass)

Hydra's public compose API is used, never its decorator: no folder is made, no directory changed, no logging set up.
Every mistake leaves this file as a ``ValueError`` of a line or two that names the dotted key, the value and the rule.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import RunConfig
from launcher import keys
from launcher.explain import explain_word, explained
from launcher.invocation import Invocation as Invocation


class Composer:
    """Composes a ``RunConfig`` from the presets shipped here and, where given, those in ``folder``."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--config-dir={folder} must be a folder of presets, for example {folder}/run/mine.yaml")
        self.folder = folder
        self.keys = keys.table(RunConfig)
        self.groups = keys.groups(keys.PRESETS, *([folder] if folder else []))
        for group, names in self.groups.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"{group}={twice[0]} is a preset shipped here and one in --config-dir={folder}: rename yours"
                )

    def compose(self, overrides: tuple[str, ...]) -> tuple[RunConfig, str]:
        """The configuration that ``overrides`` lead to, and the same as YAML with nothing left to resolve."""
        with self._hydra():
            for override in self._parse(overrides):
                if override.is_sweep_override():
                    raise ValueError(
                        f"{override.input_line} gives several values: add --multirun to run each of them, "
                        "or quote a value that has a comma"
                    )
                self._check(override)
            tree = hydra_compose("config", overrides=list(overrides) + self._search())
        with explained(self.keys):
            return build(RunConfig, tree), OmegaConf.to_yaml(tree, resolve=True)

    def sweep(self, overrides: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The overrides of every job that ``--multirun`` stands for, the last sweep varying fastest."""
        with self._hydra():
            choices = [
                [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
                if o.is_sweep_override()
                else [word]
                for word, o in zip(overrides, self._parse(overrides), strict=True)
            ]
        return list(product(*choices))

    @contextmanager
    def _hydra(self) -> Iterator[None]:
        """Hydra, set up for the duration and left as it was found; its complaints in our words."""
        store = ConfigStore.instance()
        store.store(name="schema", node=RunConfig, provider="shoestring")
        with explained(self.keys, self.groups), initialize_config_dir(str(keys.PRESETS), version_base="1.3"):
            yield

    def _search(self) -> list[str]:
        return [] if self.folder is None else [f"hydra.searchpath=[file://{self.folder.resolve()}]"]

    def _parse(self, overrides: tuple[str, ...]) -> list[Override]:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        return [_parse_one(parser, word) for word in overrides]

    def _check(self, override: Override) -> None:
        """Raises a ``ValueError`` for an unknown key or preset, or a value of the wrong type."""
        word, key = override.input_line or "", override.key_or_group
        raw = word.partition("=")[2]
        inside = [name for name in self.keys if name.startswith(f"{key}.")]
        if override.type is OverrideType.DEL:
            raise ValueError(f"{word}: a key cannot be deleted, only set; keys that may be empty take null")
        if override.package is not None or (override.type is OverrideType.ADD and (inside or key in self.keys)):
            raise ValueError(f"{word}: keys and presets have one place each and are only set: write {key}={raw}")
        if key in self.keys:
            check_type(self.keys, key, override.value(), raw)
        elif key in self.groups and not isinstance(override.value(), dict):
            if raw not in self.groups[key]:
                options = ", ".join(self.groups[key])
                raise ValueError(f"{key}={raw} must be one of {options}{keys.nearest(raw, self.groups[key])}")
        elif not inside:
            raise ValueError(f"{key}={raw}: there is no key {key}{keys.nearest(key, [*self.keys, *self.groups])}")
        elif not isinstance(override.value(), dict):
            raise ValueError(f"{key}={raw} must name one key of the section, for example {inside[0]}={raw}")


def compose_plain(schema: type, overrides: tuple[str, ...]) -> tuple[Any, str]:
    """The configuration of a verb that has a dataclass of its own, and the same as YAML.

    A field that is a string takes what stands behind ``=`` letter by letter, so that a prompt needs no second quoting.
    """
    table = keys.table(schema)
    parser = OverridesParser.create()
    tree = OmegaConf.structured(schema)
    with explained(table):
        for word in overrides:
            key, _, raw = word.partition("=")
            if key not in table:
                raise ValueError(f"{word}: there is no key {key}{keys.nearest(key, table)}")
            verbatim = table[key].kind is str and not (raw == "null" and table[key].optional)
            value = _escape(raw) if verbatim else _parse_one(parser, word).value()
            check_type(table, key, value, raw)
            OmegaConf.update(tree, key, value)
        return build(schema, tree), OmegaConf.to_yaml(tree, resolve=True)


def load(path: Path) -> RunConfig:
    """The configuration kept in ``path``, equal to the one it was written from."""
    with explained(keys.table(RunConfig)):
        config = build(RunConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    assert isinstance(config, RunConfig)
    return config


def build(schema: type, tree: Any) -> Any:
    """The dataclass ``schema`` that an OmegaConf tree stands for, its own checks run; ``ValueError`` for a gap."""
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must have a value: write {missing[0]}=..., or choose a preset by run=..."
        )
    return _make(schema, OmegaConf.to_container(tree, resolve=True), "", keys.table(schema))


def check_type(table: dict[str, keys.Key], key: str, value: Any, raw: str) -> None:
    """Raises a ``ValueError`` if ``value``, written as ``raw``, cannot become what ``key`` holds."""
    try:
        OmegaConf.update(OmegaConf.structured(table[key].owner), key.rpartition(".")[2], value)
    except OmegaConfBaseException:
        raise ValueError(f"{key}={raw} {table[key].rule}{table[key].hint(raw)}") from None


def _parse_one(parser: OverridesParser, word: str) -> Override:
    try:
        return parser.parse_overrides([word])[0]
    except OverrideParseException as error:
        raise ValueError(explain_word(word, error)) from error


def _escape(text: str) -> str:
    """``text`` as OmegaConf has to see it to take ``${`` for nothing but characters."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _make(schema: type, values: Any, prefix: str, table: dict[str, keys.Key]) -> Any:
    """An instance of ``schema`` from nested dictionaries: OmegaConf's own would keep lists where tuples are declared.

    A dataclass used in two places names its keys without the section; ``prefix``, the section and a dot, is put back.
    """
    made = {}
    for name, kind in keys.kinds(schema).items():
        value, key = values[name], prefix + name
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number")
        if is_dataclass(kind):
            made[name] = _make(kind, value, f"{key}.", table)  # type: ignore[arg-type]
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return schema(**made)
    except ValueError as error:
        key = str(error).partition("=")[0]
        raise ValueError(prefix + str(error) if key not in table and prefix + key in table else str(error)) from None
