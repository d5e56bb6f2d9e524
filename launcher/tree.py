"""OmegaConf's trees and our dataclasses: a tree is checked, becomes a plain dataclass at once, and is written as YAML.

With launcher/explain.py and launcher/words.py, one of the three files that know OmegaConf; launcher/words.py and
launcher/compose.py load Hydra, which takes a fifth of a second. Every rank reads its configuration by this file.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.schema import RunConfig
from launcher import keys
from launcher.explain import explained


def load(path: Path) -> RunConfig:
    """The configuration kept in ``path``, equal to the one it was written from."""
    with explained(keys.table(RunConfig)):
        config = build(RunConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    assert isinstance(config, RunConfig)
    return config


def revive(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration that a checkpoint's manifest ``where`` has as plain values, none of which is evaluated."""
    table = keys.table(RunConfig)
    try:
        with explained(table):
            config = build(
                RunConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(_quote(values)))
            )
    except ValueError as error:
        raise ValueError(f"{where} is of another version of this program: {error}") from None
    assert isinstance(config, RunConfig)
    return config


def describe(config: RunConfig) -> str:
    """``config`` as the YAML that ``load`` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(_quote(asdict(config))))


def _quote(value: Any) -> Any:
    """Nested values, with texts as OmegaConf has to see them to take them for nothing but texts."""
    if isinstance(value, Mapping):
        return {key: _quote(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_quote(each) for each in value]
    return escape(str(value)) if isinstance(value, str) else value


def build(schema: type, tree: Any) -> Any:
    """The dataclass ``schema`` that an OmegaConf tree stands for, its own checks run; ``ValueError`` for a gap."""
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        preset = ", or choose a preset by run=..." if schema is RunConfig else ""
        raise ValueError(f"{', '.join(missing)} must have a value: write {missing[0]}=...{preset}")
    return _make(schema, OmegaConf.to_container(tree, resolve=True), "", keys.table(schema))


def write(tree: Any) -> str:
    """``tree`` as YAML, nothing left to resolve."""
    return OmegaConf.to_yaml(tree, resolve=True)


def escape(text: str) -> str:
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
