"""How often Python looks for reference cycles.

Requests make hardly any; what they make is freed when it is let go of. The default (a look at the young objects after
every 700 that are new, at all of them now and then) costs a write a tenth of its processor time.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""New objects until the next look: about a millisecond's work."""
_LOOKS = 20


def settle() -> None:
    """Once, when everything is imported and nothing is running: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, _LOOKS, _LOOKS)
