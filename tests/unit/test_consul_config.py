"""Where Consul is: explicit settings win over the environment, and secrets stay out of sight."""

from contextlib import nullcontext

import pytest

from consul_backend.config import ConsulConfig


def test_defaults() -> None:
    config = ConsulConfig.from_env({}, {})
    assert config.endpoint() == ("http://127.0.0.1:8500", "")
    assert config.path == "outrider/"


@pytest.mark.parametrize(
    ("address", "scheme", "endpoint"),
    [
        ("consul", "http", ("http://consul:8500", "")),
        ("consul:18500", "https", ("https://consul:18500", "")),
        ("https://consul", "http", ("https://consul:443", "")),
        ("consul", "https", ("https://consul:443", "")),
        ("http://consul", "http", ("http://consul:8500", "")),
        ("http://[::1]:8501/", "http", ("http://[::1]:8501", "")),
        ("http://[::1]:8501/", "https", ("https://[::1]:8501", "")),
        ("[::1]", "http", ("http://[::1]:8500", "")),
        ("[2001:db8::1]:8500", "http", ("http://[2001:db8::1]:8500", "")),
        ("unix:///run/consul.sock", "https", ("http://localhost", "/run/consul.sock")),
    ],
)
def test_addresses(address: str, scheme: str, endpoint: tuple[str, str]) -> None:
    assert ConsulConfig(address=address, scheme=scheme).endpoint() == endpoint


@pytest.mark.parametrize(
    "address", ["ftp://x", "http://", "http://user:pass@x", "http://x/path", "http://x?y", "x:port", "::1", "unix://"]
)
def test_impossible_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ConsulConfig(address=address)


def test_every_variable_is_read() -> None:
    environ = {
        "CONSUL_HTTP_ADDR": "c:1",
        "CONSUL_HTTP_TOKEN": "t",
        "CONSUL_HTTP_TOKEN_FILE": "f",
        "CONSUL_HTTP_AUTH": "u:p",
        "CONSUL_HTTP_SSL": "true",
        "CONSUL_HTTP_SSL_VERIFY": "false",
        "CONSUL_NAMESPACE": "n",
        "CONSUL_CACERT": "ca",
        "CONSUL_CAPATH": "cap",
        "CONSUL_CLIENT_CERT": "cc",
        "CONSUL_CLIENT_KEY": "ck",
        "CONSUL_TLS_SERVER_NAME": "sn",
    }
    assert ConsulConfig.from_env({}, environ) == ConsulConfig(
        address="c:1",
        scheme="https",
        token_file="f",
        http_auth="u:p",
        namespace="n",
        ca_file="ca",
        ca_path="cap",
        client_cert="cc",
        client_key="ck",
        tls_server_name="sn",
        tls_skip_verify=True,
    )


def test_explicit_settings_win() -> None:
    environ = {
        "CONSUL_HTTP_ADDR": "c:1",
        "CONSUL_HTTP_SSL": "1",
        "CONSUL_HTTP_SSL_VERIFY": "false",
        "CONSUL_HTTP_TOKEN": "from-environment",
        "CONSUL_CACERT": "ca",
    }
    explicit = {
        "address": "mine:2",
        "token_file": "file",
        "tls_ca_file": "own",
        "tls_skip_verify": "false",
        "path": "/v/",
    }
    config = ConsulConfig.from_env(explicit, environ)
    assert config.endpoint() == ("http://mine:2", "")
    assert (config.token, config.token_file, config.ca_file) == ("", "file", "own")
    assert config.tls_skip_verify is False
    assert config.path == "v/"


@pytest.mark.parametrize(("partition", "fits"), [("", True), ("default", True), ("team", False)])
def test_a_partition_is_refused_instead_of_passed_over(partition: str, fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(ValueError, match="CONSUL_PARTITION: admin partitions"):
        ConsulConfig.from_env({}, {"CONSUL_PARTITION": partition})


@pytest.mark.parametrize(
    "explicit",
    [
        {"adress": "x"},
        {"path": "a//b"},
        {"path": "a.b"},
        {"path": "/"},
        {"tls_key_file": "k"},
        {"tls_skip_verify": "maybe"},
    ],
)
def test_settings_that_cannot_work(explicit: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        ConsulConfig.from_env(explicit, {})


def test_the_token_is_not_shown() -> None:
    assert "s3cret" not in repr(ConsulConfig(token="s3cret", http_auth="u:s3cret"))
