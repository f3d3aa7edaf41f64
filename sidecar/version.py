"""The version and the name, in one place that costs nothing to import."""

from __future__ import annotations

import os
import sys

__version__ = "0.1.0"

COMPATIBLE_WITH = "1.15.0"
"""The version of Vault whose API this server speaks, as far as docs/compatibility.md says."""


def product() -> str:
    """How the program calls itself: as it was called. Scripts wait for the words that they know."""
    return "Vault" if os.path.basename(sys.argv[0]) == "vault" else "Outrider"


def version_text() -> str:
    """One line with both versions. Tools that start ``vault`` read the version after the first word; whatever it was
    called, the line says what it is."""
    if product() == "Vault":
        return f"Vault v{COMPATIBLE_WITH} compatible; this is Outrider v{__version__}"
    return f"Outrider v{__version__}, Vault v{COMPATIBLE_WITH} compatible"
