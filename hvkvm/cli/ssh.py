"""`hvkvm run --ssh`: a port of this host that leads to the guest's ssh, and the command that uses it."""

from __future__ import annotations

import socket

from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.nic_spec import forwards_of

SSH_PORT = 22


def with_ssh(config: MachineConfig) -> tuple[MachineConfig, str]:
    """`config` with a forward to the guest's port 22, if it has none yet; the command. ConfigError."""
    for index, spec in enumerate(config.nets):
        if spec.backend != "user":
            continue
        for protocol, host, port, guest_port in forwards_of(spec):
            if (protocol, guest_port) == ("tcp", SSH_PORT):
                return config, _command(host, port)
        port = _free_port()
        nets = list(config.nets)
        nets[index] = spec._replace(forward=(*spec.forward, f"{port}-{SSH_PORT}"))
        return config._replace(nets=tuple(nets)), _command("127.0.0.1", port)
    raise ConfigError("--ssh: leads through the user-mode network; add --net user")


def _command(host: str, port: int) -> str:
    address = host if host not in ("", "0.0.0.0", "::") else "127.0.0.1"
    return f"ssh -p {port} root@{address}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
