"""``pcsc-safe completion SHELL``: the completion of the command line for a shell, made from its own parsers.

So a new command or option needs no change here.  Nothing here forks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["EPILOG", "add_arguments", "main"]

EPILOG = """bash:  eval "$(pcsc-safe completion bash)"          in ~/.bashrc
zsh:   eval "$(pcsc-safe completion zsh)"           in ~/.zshrc, after compinit
fish:  pcsc-safe completion fish > ~/.config/fish/completions/pcsc-safe.fish"""

_PROGRAM = "pcsc-safe"


class _Option(NamedTuple):
    """An option of a command.

    :ivar takes_value: whether it takes a value.
    :ivar values: the possible values; if empty, file names are completed.
    """

    name: str
    summary: str
    takes_value: bool
    values: list[str]


class _Command(NamedTuple):
    """A command.

    :ivar words: the words that it takes besides options.
    :ivar takes_program: whether file names are completed for it.
    """

    name: str
    summary: str
    options: list[_Option]
    words: list[str]
    takes_program: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=sorted(_SCRIPTS), help="print the script for this shell")


def main(options: argparse.Namespace) -> int:
    """Print the script.

    :param options: the parsed arguments, with the whole parser as ``tree``.
    """
    print(_SCRIPTS[options.shell](list(_commands(options.tree))), flush=True)
    return 0


def _commands(tree: argparse.ArgumentParser) -> Iterator[_Command]:
    subparsers = next(action for action in tree._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {action.dest: action.help or "" for action in subparsers._choices_actions}
    for name, parser in subparsers.choices.items():
        options = [
            _Option(option, (action.help or "").replace("%%", "%"), _takes_value(action), _values(action))
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--") and action.help is not argparse.SUPPRESS
        ]
        words = [word for action in parser._actions if not action.option_strings for word in action.choices or ()]
        yield _Command(name, summaries[name], options, words, takes_program="script.py" in (parser.usage or ""))


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs is None or action.nargs == "+"


def _values(action: argparse.Action) -> list[str]:
    return [str(value) for value in getattr(action, "values", None) or action.choices or ()]


def _bash(commands: list[_Command]) -> str:
    cases = []
    for command in commands:
        for option in command.options:
            if option.takes_value:
                cases.append(f'"{command.name} {option.name}") offered="{" ".join(option.values)}" ;;')
        names = " ".join([*command.words, *(option.name for option in command.options)])
        if command.takes_program:  # what doesn't begin with - is a file
            cases.append(f'"{command.name} "*) case $word in -*) offered="{names}" ;; esac ;;')
        else:
            cases.append(f'"{command.name} "*) offered="{names}" ;;')
    lines = "\n        ".join(cases)
    return f"""_pcsc_safe() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} offered=
    if [ "$COMP_CWORD" -eq 1 ]; then
        offered="{" ".join(command.name for command in commands)} --help --version"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
        {lines}
        esac
    fi
    COMPREPLY=($(compgen -W "$offered" -- "$word"))
}}
complete -o default -F _pcsc_safe {_PROGRAM}"""


def _zsh(commands: list[_Command]) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: list[_Command]) -> str:
    names = " ".join(command.name for command in commands)
    first = f"not __fish_seen_subcommand_from {names}"
    lines = [f"complete -c {_PROGRAM} -f -n {_quoted(first)}"]
    for command in commands:
        lines.append(f"complete -c {_PROGRAM} -n {_quoted(first)} -a {command.name} -d {_quoted(command.summary)}")
        seen = _quoted(f"__fish_seen_subcommand_from {command.name}")
        if not command.takes_program:
            lines.append(f"complete -c {_PROGRAM} -f -n {seen}")
        if command.words:
            lines.append(f"complete -c {_PROGRAM} -n {seen} -a {_quoted(' '.join(command.words))}")
        for option in command.options:
            value = f" -x -a {_quoted(' '.join(option.values))}" if option.values else " -r"
            line = f"complete -c {_PROGRAM} -n {seen} -l {option.name[2:]}{value if option.takes_value else ''}"
            lines.append(f"{line} -d {_quoted(option.summary)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_SCRIPTS = {"bash": _bash, "fish": _fish, "zsh": _zsh}
