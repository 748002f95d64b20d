"""Reserves the port that all workers listen on."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves the port for this process and its children for the length of the context, and gives its number.

    With SO_REUSEPORT, sockets of one user may share a port, and Linux spreads connections over the sockets that listen. The
    sockets here never listen. They hold the port while no worker runs, and keep other servers from taking it: they are bound
    without SO_REUSEPORT, which fails if the port is taken, and get SO_REUSEPORT afterwards. Only a server of the same user
    that binds with SO_REUSEPORT can still join.

    Arguments:
        host: A name or an address, with or without brackets.
        port: The port; 0 for any free port.

    Raises:
        OSError: The port is taken, or the host is not an address of this machine.
    """
    address = f"{host}:{port}"
    with ExitStack() as sockets:
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, place in dict.fromkeys(found):
                holder = sockets.enter_context(socket.socket(family, kind, protocol))
                if family == socket.AF_INET6:
                    holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # Otherwise closed connections of the previous server would block the port for a minute.
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # If port is 0, the other addresses of the host get the port of the first one.
                holder.bind((place[0], port, *place[2:]))
                port = holder.getsockname()[1]
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: is the address right, and free?") from error
        yield port
