"""Where something listens: the path of a socket, or `tcp:HOST:PORT`.

Domains share no files, so what is in another one is reached over a network.
"""

from __future__ import annotations

import socket
from typing import Final

_TCP: Final = "tcp:"


def _host_and_port(address: str) -> tuple[str, int]:
    host, port = address.removeprefix(_TCP).rsplit(":", 1)
    return host, int(port)


def connect(address: str) -> socket.socket:
    """Return a connection; raises OSError."""
    if not address.startswith(_TCP):
        connection = socket.socket(socket.AF_UNIX)
        # Without a timeout: with one, Python takes a full backlog for a connection.
        connection.connect(address)
        return connection
    connection = socket.create_connection(_host_and_port(address))
    # Requests are short, and each waits for its answer.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def listen(address: str) -> socket.socket:
    """Return a socket that accepts connections; raises OSError."""
    if address.startswith(_TCP):
        return socket.create_server(_host_and_port(address))
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    return server
