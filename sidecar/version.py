"""The version and the name, in one place that costs nothing to import."""

from __future__ import annotations

import os
import sys

__version__ = "0.1.0"

COMPATIBLE_WITH = "1.15.0"
"""The version of Vault whose API this server speaks, as far as docs/compatibility.md says."""

API_VERSION = f"{COMPATIBLE_WITH}+outrider.{__version__}"
"""What the API answers for a version. Clients compare it with versions of Vault: Nomad places jobs with a ``vault``
block only on nodes that saw 0.6.1 or later, Terraform's provider leaves out what came with later ones. What it is in
truth stands behind the plus sign, which Semantic Versioning leaves out of every comparison."""

PLUGIN_VERSION = f"v{__version__}+builtin.outrider"
"""Of every engine and auth method that is part of the server."""


def product() -> str:
    """How the program calls itself: as it was called. Scripts wait for the words that they know."""
    return "Vault" if os.path.basename(sys.argv[0]) == "vault" else "Outrider"


def version_text() -> str:
    """One line with both versions. Tools that start ``vault`` read the version after the first word; whatever it was
    called, the line says what it is."""
    if product() == "Vault":
        return f"Vault v{COMPATIBLE_WITH} compatible; this is Outrider v{__version__}"
    return f"Outrider v{__version__}, Vault v{COMPATIBLE_WITH} compatible"
