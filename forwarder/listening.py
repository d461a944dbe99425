"""A listening socket on every address of the machine, IPv4 and IPv6, with one port."""

from __future__ import annotations

import socket


def everywhere(port: int, backlog: int) -> socket.socket:
    """Raises ``OSError`` where the port is taken. IPv4 only where the machine has no IPv6. IPv4 senders appear as ``::ffff:1.2.3.4``."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)
