"""The daemon and its command line: the Vault-compatible API, the core, the engines and replication.

The import name ``sidecar`` is also that of an unrelated package on PyPI (a JupyterLab widget). Installed into the same
environment the two overwrite each other's files, which would surface much later and far from its cause.
"""

import os as _os

if _os.path.exists(_os.path.join(_os.path.dirname(__file__), "_frontend.py")):
    raise ImportError(
        "the PyPI package 'sidecar' (a JupyterLab widget) is installed over Outrider's package of the same name; "
        "give Outrider an environment of its own and install it again"
    )
