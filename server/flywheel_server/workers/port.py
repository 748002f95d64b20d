"""The port that all workers listen on."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves the port for the length of the context, for this process and those that it starts, and gives its number.

    Sockets with SO_REUSEPORT may share a port if one user has made them all, and Linux spreads connections over those that
    listen. The sockets here never listen. They keep the port while no worker is there, and away from other servers: they are
    bound without SO_REUSEPORT, which fails if anybody else has the port, and get it afterwards. A server of the same user
    that asks for SO_REUSEPORT when it binds is the only one that can join.

    Arguments:
        host: A name or an address, in brackets or not.
        port: The port; 0 is any free one.

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
                # Connections that the last server has closed would keep the port for a minute.
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # All addresses of a name get the port that the first one got.
                holder.bind((place[0], port, *place[2:]))
                port = holder.getsockname()[1]
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: is the address right, and free?") from error
        yield port
