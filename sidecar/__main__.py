"""``outrider``: finds the command and runs it. Exit codes: 0, 1 (usage, local), 2 (server error, sealed), 127."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sidecar.cli import registry


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if not tokens:
        return _print_help(registry.overview(), code=127)
    if tokens[0] in ("-h", "-help", "--help"):
        return _print_help(registry.overview(), code=0)
    if tokens[0] in ("-v", "-version", "--version"):
        tokens = ["version"]
    name = registry.find(tokens)
    if name is None:
        return _no_command(tokens)
    try:
        return _run(name, tokens[len(name) :])
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        # The reader has gone; without this the interpreter complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(name: tuple[str, ...], tokens: list[str]) -> int:
    from sidecar.cli import flags
    from sidecar.cli.command import EXIT_LOCAL, Call, Failed, NotSent

    command = registry.load(name)
    try:
        values, arguments = flags.parse(tokens, command.all_flags())
        code = command.run(Call(values, arguments, formats=command.formats))
        sys.stdout.flush()
        return code
    except flags.HelpWanted:
        return _print_help(command.help(), code=0)
    except flags.UsageError as error:
        print(f"{error}\n\nUsage: outrider {command.usage}", file=sys.stderr)
        return EXIT_LOCAL
    except NotSent as request:
        print(request)
        return 0
    except Failed as error:
        print(error, file=sys.stderr)
        return error.code


def _no_command(tokens: Sequence[str]) -> int:
    group = tokens[0]
    from sidecar.cli.elsewhere import instead

    if hint := instead(tokens):
        print(f'"{" ".join(tokens[:2]).strip()}" is not available: {hint}', file=sys.stderr)
        return 1
    if group not in registry.GROUPS:
        print(f'unknown command "{group}"{_hint(group)}\n\n{registry.overview()}', file=sys.stderr)
        return 127
    wanted = tokens[1] if len(tokens) > 1 else ""
    if wanted in ("-h", "-help", "--help"):
        return _print_help(registry.group_help(group), code=0)
    if not wanted:
        return _print_help(registry.group_help(group), code=1)
    print(f'unknown command "{group} {wanted}"\n\n{registry.group_help(group)}', file=sys.stderr)
    return 127


def _hint(word: str) -> str:
    import difflib  # only on the way to an error

    known = {name[0] for name in registry.COMMANDS}
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f'; did you mean "{found[0]}"?' if found else ""


def _print_help(text: str, *, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
