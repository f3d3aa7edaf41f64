"""Longest mount by whole segments."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.request.request_id import new_request_id
from sidecar.request.router import Router


def test_a_request_id_is_a_random_uuid() -> None:
    names = {new_request_id() for _ in range(200)}
    assert len(names) == 200
    for name in names:
        read = uuid.UUID(name)
        assert (str(read), read.version, read.variant) == (name, 4, uuid.RFC_4122)


def router(*mounts: str) -> Router[str]:
    return Router({mount: mount.upper() for mount in mounts})


@pytest.mark.parametrize(
    ("path", "mount", "rest"),
    [
        ("secret/a", "secret/", "a"),
        ("secret/a/b", "secret/a/", "b"),
        ("secret/ab", "secret/", "ab"),
        ("secret/", "secret/", ""),
        ("secret", "secret/", ""),
        ("auth/token/create", "auth/token/", "create"),
        ("auth/users/login/x", "auth/users/", "login/x"),
        ("sys/mounts/secret/", "sys/", "mounts/secret/"),
    ],
)
def test_the_longest_mount_serves(path: str, mount: str, rest: str) -> None:
    mounts = ["secret/", "auth/token/", "auth/users/", "sys/"]
    if mount == "secret/a/":
        mounts.append(mount)
    match = router(*mounts).match(path)
    assert match is not None
    assert (match.mount, match.target, match.rest) == (mount, mount.upper(), rest)


@pytest.mark.parametrize("path", ["", "nosuch", "secretly/a", "secrets", "auth", "auth/", "SECRET/a", "/secret/a"])
def test_other_paths_have_no_mount(path: str) -> None:
    assert router("secret/", "auth/token/").match(path) is None


def test_a_mount_path_ends_in_a_slash() -> None:
    for bad in ("secret", "/secret/", ""):
        with pytest.raises(ValueError, match="mount path"):
            router(bad)


segments = st.lists(st.sampled_from(["a", "b", "aa", "ab"]), min_size=1, max_size=4)


@given(st.sets(segments.map(lambda parts: "/".join(parts) + "/"), max_size=8), segments.map("/".join), st.booleans())
def test_agrees_with_looking_at_every_mount(mounts: set[str], path: str, slash: bool) -> None:
    path += "/" if slash else ""
    match = router(*mounts).match(path)
    fitting = [mount for mount in mounts if path.startswith(mount) or path + "/" == mount]
    assert (match.mount if match else None) == max(fitting, key=len, default=None)
    if match:
        assert (match.mount + match.rest).rstrip("/") == path.rstrip("/")
