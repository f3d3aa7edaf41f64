"""Finds engine classes by their type name: entry points first, then what ships with the server."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from plugin_api.engine import Engine

SECRETS = "outrider.secrets"
AUTH = "outrider.auth"

# A checkout that was never installed has no entry points of its own.
_BUILT_IN = {
    SECRETS: {"kv": "sidecar.engines.kv:KV", "transit": "sidecar.engines.transit.engine:Transit"},
    AUTH: {"approle": "sidecar.auth.approle:AppRole", "userpass": "sidecar.auth.userpass:Userpass"},
}


class PluginNotFound(LookupError):
    """No engine of that type is installed."""


class PluginRegistry:
    """Types by group; a class is imported when it is first mounted."""

    def __init__(self, found: dict[str, dict[str, EntryPoint]]) -> None:
        self._found = found

    @classmethod
    def installed(cls) -> PluginRegistry:
        """What this environment offers. An entry point cannot replace a built-in type."""
        found: dict[str, dict[str, EntryPoint]] = {}
        for group, built_in in _BUILT_IN.items():
            types = {point.name: point for point in entry_points(group=group)}
            types.update({name: EntryPoint(name, value, group) for name, value in built_in.items()})
            found[group] = types
        return cls(found)

    def types(self, group: str) -> list[str]:
        """Sorted type names of a group."""
        return sorted(self._found.get(group, {}))

    def load(self, group: str, type_name: str) -> type[Engine]:
        """The engine class. Raises :class:`PluginNotFound`, also where it cannot be imported or is no engine."""
        point = self._found.get(group, {}).get(type_name)
        if point is None:
            raise PluginNotFound(f"plugin not found in the catalog: {type_name}")
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise PluginNotFound(f"plugin {type_name} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Engine)):
            raise PluginNotFound(f"plugin {type_name} is not an engine")
        return loaded
