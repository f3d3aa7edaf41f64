"""Run published clients' own test suites against this server, which they start, or find, under the name ``vault``.

    python scripts/client_suites.py [suite ...]

What is run, and what is known not to work and why, stands in ``client_suites.toml``. The packages are fetched at pinned
versions into ``.cache/clients``, each with an environment of its own; nothing of theirs is kept in this repository. The
exit status is 1 when a test fails that should pass, and when one passes that should fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.client_outcomes import Outcome, Suite, Verdict, judge, read_junit, read_suites, table
from scripts.consul_binary import obtain_consul

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "clients"
SUITES = PROJECT / "scripts" / "client_suites.toml"
SUITE_TIMEOUT_S = 1800
COMMAND_TIMEOUT_S = 300
SERVER_TIMEOUT_S = 180
TOKEN = "root-of-the-client-suites"  # of a development server on loopback
NOT_PASSED_ON = ("VAULT_", "BAO_", "OUTRIDER_", "CONSUL_", "PYTEST", "PYTHON")
"""What this machine's environment says about servers, and about the interpreter that runs this script."""
TRIES = 2
"""Suites give a server fixed seconds to be there, which a loaded machine may not have: what failed is tried again."""

VAULT = """#!{python}
import sys
sys.path.insert(0, {project!r})
from sidecar.__main__ import main
sys.exit(main())
"""
# hvac's suite turns a port off that older Consuls do not have, and these take no flag they do not know.
CONSUL = """#!/bin/sh
for word; do
  shift
  case "$word" in -grpc-tls-port=*) ;; *) set -- "$@" "$word" ;; esac
done
exec "{consul}" "$@"
"""


class SuiteBroken(Exception):
    """A suite could not be run at all; the message says why."""


def main(names: Sequence[str]) -> int:
    """Run the named suites, or all; print a table of what they did."""
    suites = read_suites(SUITES)
    unknown = sorted(set(names) - set(suites))
    if unknown:
        print(f"no such suite: {', '.join(unknown)}; there are {', '.join(suites)}", file=sys.stderr)
        return 1
    programs = make_programs(CACHE / "bin")
    verdicts: dict[str, Verdict] = {}
    broken: dict[str, str] = {}
    for name in names or suites:
        print(f"==> {name}: {suites[name].package}", flush=True)
        try:
            verdicts[name] = run_suite(name, suites, programs)
        except SuiteBroken as error:
            broken[name] = str(error)
    print(table(verdicts))
    for name, reason in broken.items():
        print(f"{name} could not be run: {reason}")
    return 1 if broken or not all(verdict.good for verdict in verdicts.values()) else 0


def make_programs(folder: Path) -> Path:
    """A folder for PATH in which this server is called ``vault``, beside a Consul that takes today's flags."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "vault": VAULT.format(python=sys.executable, project=str(PROJECT)),
        "consul": CONSUL.format(consul=obtain_consul()),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run_suite(name: str, suites: Mapping[str, Suite], programs: Path) -> Verdict:
    """Fetch and run one suite. Raises SuiteBroken."""
    suite = suites[name]
    source = CACHE / "folder" / name if suite.commands else fetched(suite)
    source.mkdir(parents=True, exist_ok=True)
    python = environment_of(suite)
    values = {"address": f"http://127.0.0.1:{two_free_ports()}", "token": TOKEN, "folder": str(source)}
    for wanted, target in suite.copies:
        other, _, path = wanted.partition(":")
        place(source / target, (fetched(suites[other]) / path).read_bytes())
    for target, text in suite.files.items():
        place(source / target, text.format(**values).encode() if suite.dev_server else text.encode())
    variables = {key: value for key, value in os.environ.items() if not key.startswith(NOT_PASSED_ON)}
    variables |= {key: value.format(**values) for key, value in suite.environment.items()}
    variables["PATH"] = f"{programs}:{python.parent}:{variables['PATH']}"
    with development_server(values, variables, suite) if suite.dev_server else nothing():
        if suite.commands:
            return judge(suite, run_commands(suite, values, variables, source))
        outcomes = run_pytest(suite, suite.tests, python, source, variables)
        for attempt in range(2, TRIES + 1):
            again = judge(suite, outcomes).failed
            if again:
                print(f"    once more: {len(again)} that failed", flush=True)
                outcomes |= run_pytest(suite, again, python, source, variables, attempt)
        return judge(suite, outcomes)


def place(path: Path, content: bytes) -> None:
    """Write a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# ---- what is fetched


def fetched(suite: Suite) -> Path:
    """The unpacked source of the suite's package. Raises SuiteBroken."""
    target = CACHE / "source" / suite.package
    if target.exists():
        return target
    download = CACHE / "download" / suite.package
    shutil.rmtree(download, ignore_errors=True)
    pip(sys.executable, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(download), suite.package)
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(download, filter="data")
    (unpacked,) = (path for path in download.iterdir() if path.is_dir())
    target.parent.mkdir(parents=True, exist_ok=True)
    unpacked.rename(target)
    return target


def environment_of(suite: Suite) -> Path:
    """The interpreter of the suite's own environment, with what it needs installed. Raises SuiteBroken."""
    folder = CACHE / "environment" / suite.package
    python, mark = folder / "bin" / "python", folder / "needs"
    wanted = "\n".join(suite.needs)
    if mark.exists() and mark.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(str(python), "install", *suite.needs)
    mark.write_text(wanted)
    return python


def pip(python: str, *arguments: str) -> None:
    """Run pip quietly. Raises SuiteBroken with what it said last."""
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise SuiteBroken(f"pip {arguments[0]} failed: {said[-1] if said else done.returncode}")


# ---- what is run


def run_pytest(
    suite: Suite, tests: Sequence[str], python: Path, folder: Path, variables: Mapping[str, str], attempt: int = 1
) -> dict[str, Outcome]:
    """What each test did, by its id; pytest's words stand in ``output-<attempt>.txt``. Raises SuiteBroken when it did
    not come to an end."""
    report = CACHE / "report.xml"
    report.unlink(missing_ok=True)
    settings = CACHE / "pytest.ini"  # its own: pytest would take the one of this project, which lies above
    settings.write_text("[pytest]\njunit_family = xunit1\n")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(settings), f"--rootdir={folder}"]
    command += [
        "--durations=10",
        f"--junitxml={report}",
        *suite.arguments,
        *(f"--ignore={path}" for path in suite.ignored_files()),
    ]
    with (CACHE / f"output-{attempt}.txt").open("w") as output:
        # A session of its own, so that servers that a suite leaves behind end with it.
        process = subprocess.Popen(
            [*command, *tests], cwd=folder, env=dict(variables), stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(timeout=SUITE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise SuiteBroken(f"it took longer than {SUITE_TIMEOUT_S} s; see {output.name}") from None
        finally:
            end_session(process.pid)
    if not report.exists():
        raise SuiteBroken(f"pytest ended with {process.returncode} and without a report; see {output.name}")
    return read_junit(report)


def run_commands(
    suite: Suite, values: Mapping[str, str], variables: Mapping[str, str], folder: Path
) -> dict[str, Outcome]:
    """Whether each command line ends with its exit code, in their order; what one said, a later one has in braces."""
    outcomes: dict[str, Outcome] = {}
    known = dict(values)
    for step in suite.steps():
        command = step.line
        for key, value in known.items():
            command = command.replace("{" + key + "}", value)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=dict(variables),
            input=step.input,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if step.name:
            known[step.name] = done.stdout.strip()
        good = done.returncode == step.code
        identity = step.line if step.line not in outcomes else f"{step.line} ({len(outcomes)})"
        outcomes[identity] = Outcome.PASSED if good else Outcome.FAILED
        if not good:
            print(f"    {step.line}: exit code {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
    return outcomes


def end_session(leader: int) -> None:
    """Kill what is left of a session that this script began."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@contextmanager
def nothing() -> Iterator[None]:
    """No server beside the suite."""
    yield


@contextmanager
def development_server(values: Mapping[str, str], variables: Mapping[str, str], suite: Suite) -> Iterator[None]:
    """A ``vault server -dev`` beside the suite, prepared as it wants it. Raises SuiteBroken."""
    address = values["address"]
    listen = f"-dev-listen-address={address.removeprefix('http://')}"
    command = ["vault", "server", "-dev", f"-dev-root-token-id={values['token']}", listen]
    with (CACHE / "server.txt").open("w") as output:
        process = subprocess.Popen(command, env=dict(variables), stdout=output, stderr=output)
        try:
            await_server(address, process)
            for arguments in suite.prepare:
                there = {**variables, "VAULT_ADDR": address, "VAULT_TOKEN": values["token"]}
                done = subprocess.run(["vault", *arguments], env=there, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SuiteBroken(f"vault {' '.join(arguments)}: {done.stderr.strip()}")
            yield
        finally:
            process.kill()
            process.wait()


def await_server(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until it serves. Raises SuiteBroken."""
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/v1/sys/health", timeout=SERVER_TIMEOUT_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SuiteBroken("the development server did not come up; see .cache/clients/server.txt")


def two_free_ports() -> int:
    """A port that is free, with the next one, the cluster port's, free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
