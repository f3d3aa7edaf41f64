"""The Nomad job file: syntax, names and nesting, and what it promises about stopping, updating and configuration."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hcl2
import pygohcl
import pytest

from plugin_api.formats import parse_duration
from sidecar.api.health import health_code
from sidecar.api.node_view import NodeHealth
from sidecar.config import ConsulStorage, ServerConfig, load_text
from sidecar.mesh.registration import Intervals
from sidecar.roles import RoleOptions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "nomad"
JOB_FILE = FOLDER / "outrider.nomad.hcl"
FIELDS = json.loads((ROOT / "tests" / "data" / "nomad_jobspec_fields.json").read_text(encoding="utf-8"))["blocks"]
CLIENT_MAX_KILL_TIMEOUT_S = 30.0
"""max_kill_timeout of a Nomad client that does not set it; a longer kill_timeout is cut to it silently."""

Block = tuple[str, list[str], dict[str, Any]]


def blocks_of(body: dict[str, Any]) -> Iterator[Block]:
    """Blocks inside a body that python-hcl2 read with its block marks."""
    for name, value in body.items():
        for item in value if isinstance(value, list) else []:
            labels = []
            while isinstance(item, dict) and "__is_block__" not in item and len(item) == 1:
                label, item = next(iter(item.items()))
                labels.append(label.strip('"'))
            if isinstance(item, dict) and "__is_block__" in item:
                yield name, labels, item


def unknown_names(text: str) -> list[str]:
    """Every attribute and block of a job file that its place does not know, as ``job.group: name``."""
    problems: list[str] = []

    def walk(kind: str, body: dict[str, Any], place: str) -> None:
        known = FIELDS[kind]
        if known.get("open"):
            return
        inner = list(blocks_of(body))
        names = {name for name, _, _ in inner}
        for name in body:
            if name.startswith("__") or name in names:  # the parser's own marks
                continue
            if name not in known["attributes"]:
                problems.append(f"{place}: {name}")
        for name, _, nested in inner:
            if name not in known["blocks"]:
                problems.append(f"{place}: {name}")
            else:
                walk(name, nested, f"{place}.{name}")

    walk("<root>", hcl2.loads(text), "")
    return problems


def find(body: dict[str, Any], *path: str) -> list[dict[str, Any]]:
    """The bodies of the blocks at a path of block names."""
    bodies = [body]
    for step in path:
        bodies = [inner for each in bodies for name, _, inner in blocks_of(each) if name == step]
    return bodies


def plain(value: Any) -> Any:
    return value.strip('"') if isinstance(value, str) else value


@pytest.fixture(scope="module")
def text() -> str:
    return JOB_FILE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def job(text: str) -> dict[str, Any]:
    return hcl2.loads(text)


@pytest.fixture(scope="module")
def group(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = find(job, "job", "group")
    return found


@pytest.fixture(scope="module")
def task(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = find(group, "task")
    return found


# --- syntax and names ---


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.hcl")), ids=lambda path: path.name)
def test_every_hcl_file_is_strict_hcl2(path: Path) -> None:
    pygohcl.loads(path.read_text(encoding="utf-8"))


def test_nomad_knows_every_name_where_it_stands(text: str) -> None:
    assert unknown_names(text) == []


@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ("datacenters = var", "datacentres = var", ".job: datacentres"),
        ("kill_timeout =", "kill_timeot =", ".job.group.task: kill_timeot"),
        ("auto_revert ", "auto_rever ", ".job.group.update: auto_rever"),
        ("    network {", "    networks {", ".job.group: networks"),
        ("change_signal =", "change_sig =", ".job.group.task.template: change_sig"),
        ("      check {", "      check = {", ".job.group.service: check"),
        ('  type        = "service"', '  typ         = "service"', ".job: typ"),
    ],
)
def test_the_table_finds_mistakes(text: str, right: str, wrong: str, place: str) -> None:
    assert right in text
    assert place in unknown_names(text.replace(right, wrong))


def test_every_block_that_the_table_names_is_described() -> None:
    for name, entry in FIELDS.items():
        assert entry.get("open") or set(entry["blocks"]) <= set(FIELDS), name


# --- what the job promises ---


def test_two_nodes_on_two_machines(group: dict[str, Any]) -> None:
    assert group["count"] >= 2
    assert any(plain(each.get("operator")) == "distinct_hosts" for each in find(group, "constraint"))


def test_a_deployment_never_promotes_by_itself(group: dict[str, Any]) -> None:
    (update,) = find(group, "update")
    assert update["canary"] >= 1
    assert update["auto_promote"] == "false" or update["auto_promote"] is False
    assert update["max_parallel"] == 1
    assert plain(update["health_check"]) == "checks"
    assert parse_duration(plain(update["progress_deadline"])) > parse_duration(plain(update["healthy_deadline"]))


def test_the_node_has_time_to_step_down_before_it_is_killed(task: dict[str, Any]) -> None:
    assert plain(task["kill_signal"]) == "SIGINT"
    kill_timeout_s = parse_duration(plain(task["kill_timeout"]))
    # Leaving the catalog, draining, and taking the entry out are each bounded; Consul needs a moment for the lock.
    assert kill_timeout_s > RoleOptions().drain_s + 2 * Intervals().leave_s + 5
    assert kill_timeout_s <= CLIENT_MAX_KILL_TIMEOUT_S


def test_nomad_registers_nothing_in_consul_and_restarts_nothing_that_is_sealed(group: dict[str, Any]) -> None:
    services = find(group, "service") + find(group, "task", "service")
    assert [plain(service["provider"]) for service in services] == ["nomad"]
    assert find(group, "service", "check_restart") == []
    assert find(group, "service", "check", "check_restart") == []


def test_the_check_passes_for_every_unsealed_node_and_no_other(group: dict[str, Any]) -> None:
    (check,) = find(group, "service", "check")
    url = urlsplit(plain(check["path"]))
    assert url.path == "/v1/sys/health"
    query = parse_qs(url.query)

    def code(*, initialized: bool = True, sealed: bool = False, standby: bool = False, dr_mode: str = "") -> int:
        return health_code(NodeHealth(initialized, sealed, standby, dr_mode=dr_mode), query)

    assert code() == 200
    assert code(standby=True) == 200
    assert code(dr_mode="secondary") == 200
    assert code(sealed=True, standby=True) >= 400
    assert code(initialized=False, sealed=True, standby=True) >= 400


def test_static_ports_are_the_ones_that_other_clusters_expect(group: dict[str, Any]) -> None:
    ports = {labels[0]: body["static"] for name, labels, body in blocks_of(find(group, "network")[0]) if name == "port"}
    assert ports == {"http": 8200, "cluster": 8201}


def test_no_template_restarts_the_node_and_secrets_stay_in_memory(task: dict[str, Any]) -> None:
    templates = find(task, "template")
    assert {plain(each["change_mode"]) for each in templates} <= {"noop", "signal"}
    for each in templates:
        if plain(each["change_mode"]) == "signal":
            assert plain(each["change_signal"]) == "SIGHUP"
        if "nomadVar" in each["data"]:
            assert plain(each["destination"]).startswith("secrets/")
            assert plain(each["perms"]) == "0400"
    assert not any("TOKEN" in name for name in find(task, "env")[0])


# --- the configuration inside ---

RUNTIME = {
    "NOMAD_ADDR_http": "10.0.0.7:8200",
    "NOMAD_ADDR_cluster": "10.0.0.7:8201",
    "NOMAD_SECRETS_DIR": "/secrets",
}


def rendered_config(text: str, job: dict[str, Any]) -> str:
    """The configuration as Nomad would write it: HCL variables first, then the template's ``env`` calls."""
    defaults = {labels[0]: plain(body["default"]) for name, labels, body in blocks_of(job) if name == "variable"}
    found = re.search(r"<<-EOT\n(.*?)\n\s*EOT\n", text, re.DOTALL)
    assert found is not None
    config = re.sub(r"\$\{var\.(\w+)\}", lambda match: defaults[match[1]], found[1])
    config = re.sub(r'\{\{ env "(\w+)" \}\}', lambda match: RUNTIME[match[1]], config)
    assert "{{" not in config
    assert "${" not in config
    return config


@pytest.fixture(scope="module")
def config(text: str, job: dict[str, Any]) -> ServerConfig:
    return load_text(rendered_config(text, job), "outrider.hcl")


def test_the_template_is_a_configuration_without_a_warning(config: ServerConfig) -> None:
    assert config.warnings == ()
    assert isinstance(config.storage, ConsulStorage)
    assert config.storage.path == "outrider/"
    assert config.api_addr == "https://10.0.0.7:8200"
    assert config.cluster_addr == "https://10.0.0.7:8201"
    (listener,) = config.listeners
    assert (listener.address, listener.cluster_address) == ("10.0.0.7:8200", "10.0.0.7:8201")
    assert not listener.tls_disable
    assert not config.service_registration.disable


def test_every_file_that_the_configuration_names_is_rendered(config: ServerConfig, task: dict[str, Any]) -> None:
    rendered = {f"/{plain(each['destination'])}" for each in find(task, "template")}
    (listener,) = config.listeners
    assert isinstance(config.storage, ConsulStorage)
    named = {listener.tls_cert_file, listener.tls_key_file, config.storage.connection.token_file}
    assert named <= rendered
    (argument,) = [each for each in find(task, "config")[0]["args"] if "-config=" in each]
    assert plain(argument).replace("${NOMAD_TASK_DIR}", "/local").removeprefix("-config=") in rendered


def test_the_consul_policy_covers_what_the_job_uses(config: ServerConfig, job: dict[str, Any]) -> None:
    policy = (FOLDER / "consul-acl-policy.hcl").read_text(encoding="utf-8")
    assert isinstance(config.storage, ConsulStorage)
    assert f'key_prefix "{config.storage.path}"' in policy
    assert f'service_prefix "{config.service_registration.service}"' in policy


def test_the_readme_names_what_the_job_reads() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    text = JOB_FILE.read_text(encoding="utf-8")
    for name in re.findall(r"\{\{ \.(\w+) \}\}", text):
        assert f"{name}=" in readme, name
    for name in re.findall(r'^variable "(\w+)"', text, re.MULTILINE):
        assert f"`{name}`" in readme, name
    assert "nomad/jobs/outrider" in readme
