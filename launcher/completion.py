"""``shoestring completion``: scripts that let a shell complete verbs, presets, keys and values.

    eval "$(shoestring completion bash)"          the same for zsh;   shoestring completion fish | source

The scripts hand the line up to the cursor to ``shoestring completion words``, which prints one candidate a line. That
runs at every press of the key, so nothing beyond the standard library is loaded for it.
"""

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from launcher import cli, keys
from launcher.invocation import Invocation

SUMMARY = "print a completion script for bash, zsh or fish"
ARGUMENTS = ("shell",)
Config = None

BASH = r"""_shoestring() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    local current="${line##*[[:space:]]}" held=""
    # bash splits words at "=" and ":", and puts back what stands before them by itself
    [[ $current == *[=:]* ]] && held="${current%"${current##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("${word#"$held"}")
    done < <(SHOESTRING_LINE="$line" shoestring completion words 2>/dev/null)
    [[ ${COMPREPLY[0]-} == *[=.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _shoestring shoestring"""
ZSH = r"""_shoestring() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found open whole
    found=("${(@f)$(SHOESTRING_LINE="$line" shoestring completion words 2>/dev/null)}")
    open=("${(@M)found:#*[=.]}")
    whole=("${(@)found:#*[=.]}")
    compadd -Q -S '' -- "${(@)open:#}"
    compadd -Q -- "${(@)whole:#}"
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _shoestring shoestring"""
FISH = r"""complete -c shoestring -f -a '(SHOESTRING_LINE=(commandline -cp) shoestring completion words 2>/dev/null)'"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def run(config: None, invocation: Invocation) -> int:
    """Prints the script for ``invocation.arguments[0]``, or, for ``words``, the candidates for ``$SHOESTRING_LINE``."""
    shell = invocation.arguments[0]
    if shell == "words":
        print("\n".join(complete(os.environ.get("SHOESTRING_LINE", ""))))
    elif shell in SCRIPTS:
        print(SCRIPTS[shell])
    else:
        raise ValueError(f"shell={shell} must be one of {', '.join(SCRIPTS)}{keys.nearest(shell, SCRIPTS)}")
    return 0


def complete(line: str) -> list[str]:
    """What may stand in place of the last word of ``line``, the command line up to the cursor."""
    words = line.split()
    current = "" if not words or line[-1].isspace() else words.pop()
    if len(words) <= 1:
        return _match(current, [*dict.fromkeys(verb.split()[0] for verb in cli.VERBS), "--help", "--version"])
    verb = cli.find(words[1:])
    if verb not in cli.VERBS:
        return []
    if current.startswith("-"):
        return _match(current, cli.FLAGS)
    if verb == "completion":
        return _match(current, SCRIPTS)
    module = import_module(cli.VERBS[verb])
    candidates = _complete_keys(current, getattr(module, "Config", None))
    if hasattr(module, "Keys"):
        candidates += _complete_keys(current, module.Keys)
    if getattr(module, "ARGUMENTS", ()) and "=" not in current:
        candidates += _match(current, sorted(path.parent.name for path in Path("runs").glob("*/config.yaml")))
    return candidates


def _complete_keys(current: str, schema: type | None) -> list[str]:
    """Keys one level at a time (``model.`` before ``model.moe.``), and behind ``=`` the values there are."""
    from configs.schema import RunConfig

    table = keys.table(schema or RunConfig)
    groups = {} if schema else keys.groups(keys.PRESETS)
    name, sign, _ = current.partition("=")
    if not sign:
        leaves = [f"{group}=" for group in groups] + [f"{key}=" for key in table]
        return _match(current, dict.fromkeys(_cut(leaf, len(current)) for leaf in leaves if leaf.startswith(current)))
    if name in groups:
        return _match(current, [f"{name}={option}" for option in groups[name]])
    if name not in table:
        return []
    values = table[name].values
    if isinstance(table[name].default, tuple):
        values = tuple(f"[{value}]" for value in values)
    return _match(current, [f"{name}={value}" for value in values])


def _cut(leaf: str, start: int) -> str:
    """``leaf`` up to its next dot behind position ``start``: ``model.moe.ffn=`` -> ``model.``."""
    dot = leaf.find(".", start)
    return leaf if dot < 0 else leaf[: dot + 1]


def _match(current: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(current)]


if __name__ == "__main__":
    sys.exit(cli.main(["completion", *sys.argv[1:]]))
