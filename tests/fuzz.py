"""``python -m tests.fuzz TARGET [libFuzzer options]``: one target of :mod:`tests.support.fuzz_targets` under atheris,
until it finds something, is stopped, or has done ``-runs=N`` inputs."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    """Run one target; exits with libFuzzer's code."""
    import atheris

    with atheris.instrument_imports(include=["sidecar", "plugin_api"]):
        from tests.support.fuzz_targets import TARGETS

    if not arguments or arguments[0] not in TARGETS:
        sys.exit(f"targets: {', '.join(TARGETS)}")
    atheris.Setup([sys.argv[0], *arguments[1:]], TARGETS[arguments[0]])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
