"""Words of the command line, ``key=value`` in Hydra's grammar, against the keys and types of a dataclass."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher import keys
from launcher.explain import explain_word, explained
from launcher.tree import build, escape, write


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
            mapping = key.rpartition(".")[0]
            if mapping in table and table[mapping].maps:  # a name in it, which takes a text
                OmegaConf.update(tree, key, escape(raw))
                continue
            if key not in table:
                raise ValueError(f"{word}: there is no key {key}{keys.nearest(key, table)}")
            verbatim = table[key].kind is str and not (raw == "null" and table[key].optional)
            value = escape(raw) if verbatim else parse(parser, word).value()
            check_type(table, key, value, raw)
            OmegaConf.update(tree, key, value)
        return build(schema, tree), write(tree)


def check_type(table: dict[str, keys.Key], key: str, value: Any, raw: str) -> None:
    """Raises a ``ValueError`` if ``value``, written as ``raw``, cannot become what ``key`` holds."""
    try:
        OmegaConf.update(OmegaConf.structured(table[key].owner), key.rpartition(".")[2], value)
        # A list inside of a mapping of texts passes, and is null in the end.
        fits = not table[key].maps or all(isinstance(item, str | int | float) for item in value.values())
    except OmegaConfBaseException:
        fits = False
    if not fits:
        raise ValueError(f"{key}={raw} {table[key].rule}{table[key].hint(raw)}") from None


def parse(parser: OverridesParser, word: str) -> Override:
    """``key=value`` in Hydra's grammar. ``ValueError`` if it cannot be read."""
    try:
        return parser.parse_overrides([word])[0]
    except OverrideParseException as error:
        raise ValueError(explain_word(word)) from error
