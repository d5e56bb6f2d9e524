"""From words on the command line to a typed configuration: the only file that sees Hydra and OmegaConf.

    words -> overrides -> one composed tree -> RunConfig (a plain dataclass)

Hydra's public compose API is used, never its decorator: no folder is made, no directory changed, no logging set up.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import configs.schema
from configs.schema import RunConfig

FOLDER = Path(configs.schema.__file__).parent


@dataclass(frozen=True, slots=True)
class Invocation:
    """What was asked for: the words of the command line, sorted, and the composed configuration they led to."""

    verb: str
    arguments: tuple[str, ...]  # words without "="
    overrides: tuple[str, ...]  # key=value
    yaml: str  # the composed configuration, resolved


def compose(overrides: tuple[str, ...]) -> tuple[RunConfig, str]:
    """The run configuration that ``overrides`` lead to, and the same as YAML."""
    ConfigStore.instance().store(name="schema", node=RunConfig, provider="shoestring")
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        tree = hydra_compose("config", overrides=list(overrides))
    return build(tree), OmegaConf.to_yaml(tree, resolve=True)


def compose_plain(schema: type, overrides: tuple[str, ...]) -> tuple[Any, str]:
    """The same for a verb with a dataclass of its own."""
    tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(overrides)))
    return build(tree), OmegaConf.to_yaml(tree, resolve=True)


def load(path: Path) -> RunConfig:
    """The configuration kept in ``path``, as ``compose`` returned it."""
    config = build(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    assert isinstance(config, RunConfig)
    return config


def build(tree: Any) -> Any:
    """The dataclass that an OmegaConf tree stands for, its checks run."""
    return _tuples(OmegaConf.to_object(tree))


def _tuples(node: Any) -> Any:
    """``node`` with every list turned into the tuple its field asks for: OmegaConf only makes lists."""
    if isinstance(node, list):
        return tuple(node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{field.name: _tuples(getattr(node, field.name)) for field in fields(node)})
    return node
