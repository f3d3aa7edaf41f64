"""The table of every ``sys/`` endpoint that needs a tenure."""

from __future__ import annotations

from sidecar.api.sys_audit import SysAudit
from sidecar.api.sys_config import SysConfig
from sidecar.api.sys_core import SysCore
from sidecar.api.sys_counters import SysCounters
from sidecar.api.sys_debug import SysDebug
from sidecar.api.sys_host import SysHost
from sidecar.api.sys_leases import SysLeases
from sidecar.api.sys_misc import SysMisc
from sidecar.api.sys_mounts import SysMounts
from sidecar.api.sys_parameters import declared
from sidecar.api.sys_passwords import SysPasswords
from sidecar.api.sys_plugins import SysPlugins
from sidecar.api.sys_policies import SysPolicies
from sidecar.api.sys_quotas import SysQuotas
from sidecar.api.sys_rekey import SysRekey
from sidecar.api.sys_remount import SysRemount
from sidecar.api.sys_replication import SysReplication
from sidecar.api.sys_seal import SysSeal
from sidecar.api.sys_specs import SysSpecs
from sidecar.api.sys_tools import SysTools
from sidecar.api.sys_wrapping import SysWrapping
from sidecar.core.node_settings import NodeSettings
from sidecar.core.operation_tokens import OperationTokens
from sidecar.core.password_policies import PasswordPolicies
from sidecar.core.quotas import Quotas
from sidecar.request.route_table import RouteBackend


def sys_backend(core: SysCore, quotas: Quotas, settings: NodeSettings, passwords: PasswordPolicies) -> RouteBackend:
    """The table of every ``sys/`` endpoint that needs a tenure."""
    parts = (
        SysReplication(core, OperationTokens(core.sealed, core.policies, core.now, core.random_bytes)),
        SysAudit(core),
        SysMounts(core, quotas),
        SysRemount(core, quotas),
        SysPlugins(core),
        SysConfig(core, settings),
        SysDebug(core),
        SysCounters(core),
        SysLeases(core),
        SysPasswords(passwords),
        SysPolicies(core),
        SysWrapping(core),
        SysSeal(core),
        SysRekey(core),
        SysRekey(core, recovery=True),
        SysHost(core),
        SysTools(core),
        SysQuotas(core, quotas),
        SysMisc(core),
        SysSpecs(core),
    )
    return RouteBackend("system", declared(route for part in parts for route in part.routes()))
