"""Addresses and ports to listen on, and what to say where that can't be."""

import errno
import socket

from florence2_release.tritonserver import ServerError


def ipv4(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ServerError(f"cannot listen on {host!r}: give an IPv4 address or a name that has one") from error


def bind(address: str, port: int, what: str) -> socket.socket:
    """A socket that holds the port (a free one for 0) until it is closed."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((address, port))
    except (OSError, OverflowError) as error:
        holder.close()
        raise cannot_listen(address, port, what, error) from error
    return holder


def cannot_listen(address: str, port: int, what: str, error: Exception) -> ServerError:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return ServerError(f"port {port} ({what}) is in use: stop what listens there or name another")
    return ServerError(f"cannot listen on {address} port {port} ({what}): {error}")
