"""The daemon's failpoints (:mod:`consul_backend.failpoint`), so that a test can visit each.

``tests/integration/test_failpoints.py`` compares the list with the sources and kills a process at every one of them.
"""

from __future__ import annotations

POINTS: tuple[str, ...] = (
    "init:before-genesis",
    "init:after-genesis",
    "seal:before-change",
    "seal:after-change",
    "lead:before-serving",
    "lead:before-release",
    "role:before-commit",
    "role:after-commit",
    "activation:before-reply",
    "activation:after-bootstrap",
    "activation:after-genesis",
    "activation:after-flip",
    "activation:before-drop",
    "activation:after-drop",
    "ship:before-send",
    "applier:before-commit",
    "applier:after-commit",
    "applier:before-ack",
    "sync:after-diff",
    "sync:half-way",
    "sync:before-guard",
    "sync:after-guard",
    "filter:dropping",
    "promote:before-commit",
    "promote:after-commit",
    "demote:before-commit",
    "demote:after-commit",
    "update-primary:before-commit",
    "update-primary:after-commit",
    "lost-writes:before-head",
    "certificate:before-offer",
    "certificate:after-offer",
    "certificate:before-keep",
    "certificate:after-keep",
    "certificate:after-use",
    "rotation:after-begin",
    "rotation:before-finish",
    "rotation:after-finish",
)
