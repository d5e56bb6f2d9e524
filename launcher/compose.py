"""From words on the command line to a typed configuration, by Hydra.

    words -> overrides, each checked against the schema -> one composed tree -> RunConfig (launcher/tree.py)

Hydra's public compose API is used, never its decorator: no folder is made, no directory changed, no logging set up.
Every mistake leaves this file as a ``ValueError`` of a line or two that names the dotted key, the value and the rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from configs.schema import RunConfig
from launcher import keys
from launcher.explain import explained
from launcher.tree import build, write
from launcher.words import check_type, parse


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
            tree = hydra_compose("config", overrides=[*map(self._open, overrides), *self._search()])
        with explained(self.keys):
            return build(RunConfig, tree), write(tree)

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
        with (
            explained(self.keys, self.groups, (HydraException,)),
            initialize_config_dir(str(keys.PRESETS), version_base="1.3"),
        ):
            yield

    def _search(self) -> list[str]:
        if self.folder is None:
            return []
        quoted = str(self.folder.resolve()).replace("\\", r"\\").replace("'", r"\'")
        return [f"hydra.searchpath=['file://{quoted}']"]

    def _open(self, word: str) -> str:
        """``word`` as Hydra has to see it where it sets names in a mapping that takes any: it knows none of them."""
        return f"++{word}" if self._find_mapping(word.partition("=")[0]) else word

    def _find_mapping(self, key: str) -> str | None:
        """The mapping that ``key`` is, or is a name in."""
        return next(
            (name for name in (key, key.rpartition(".")[0]) if name in self.keys and self.keys[name].maps), None
        )

    def _parse(self, overrides: tuple[str, ...]) -> list[Override]:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        return [parse(parser, word) for word in overrides]

    def _check(self, override: Override) -> None:
        """Raises a ``ValueError`` for an unknown key or preset, or a value of the wrong type."""
        word, key = override.input_line or "", override.key_or_group
        raw = word.partition("=")[2]
        inside = [name for name in self.keys if name.startswith(f"{key}.")]
        if override.type is OverrideType.DEL:
            raise ValueError(f"{word}: a key cannot be deleted, only set; keys that may be empty take null")
        if override.package is not None or (override.type is OverrideType.ADD and (inside or key in self.keys)):
            raise ValueError(f"{word}: keys and presets have one place each and are only set: write {key}={raw}")
        mapping = self._find_mapping(key)
        if mapping is not None and key != mapping:
            if not isinstance(override.value(), str | int | float):
                raise ValueError(f"{key}={raw} must be a string: a value of {mapping}")
        elif key in self.keys:
            check_type(self.keys, key, override.value(), raw)
        elif key in self.groups and not isinstance(override.value(), dict):
            if raw not in self.groups[key]:
                options = ", ".join(self.groups[key])
                raise ValueError(f"{key}={raw} must be one of {options}{keys.nearest(raw, self.groups[key])}")
        elif not inside:
            raise ValueError(
                f"{key}={raw}: there is no key {key or 'of no name'}{keys.nearest(key, [*self.keys, *self.groups])}"
            )
        elif not isinstance(override.value(), dict):
            raise ValueError(f"{key}={raw} must name one key of the section, for example {inside[0]}={raw}")
