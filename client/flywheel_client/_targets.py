"""Checks the address of a client, and finds out whether it is on this machine.

A target of gRPC is `HOST:PORT`, or a URI of https://github.com/grpc/grpc/blob/master/doc/naming.md. gRPC looks up other text as
a host name, and reports an error of the DNS.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import unquote

ACCEPTED_TARGETS: Final = (
    "HOST:PORT, such as localhost:50051, or another target of gRPC, such as dns:///NAME:PORT or unix:/PATH"
)
MAX_PORT: Final = 65535

PROXY_OPTIONS: Final = frozenset({"grpc.enable_http_proxy", "grpc.http_proxy"})
"""The channel options for proxies. If `grpc.enable_http_proxy` is 0, gRPC ignores `grpc.http_proxy`."""

_IP_SCHEMES: Final = frozenset({"ipv4", "ipv6"})
_SOCKET_SCHEMES: Final = frozenset({"unix", "unix-abstract", "vsock"})
_SCHEMES: Final = _IP_SCHEMES | _SOCKET_SCHEMES | {"dns", "xds", "google-c2p", "google-c2p-experimental"}
_HOST: Final = re.compile(r"\[(?P<ip>[^\[\]]*)\]|(?P<name>[^\s:/\[\]@?#,]+)")


def checked_target(address: object) -> str:
    """Returns the address unchanged if gRPC can use it.

    Raises:
        TypeError: The address is not a string.
        ValueError: The address is not a target of gRPC.
    """
    if not isinstance(address, str):
        raise TypeError(f"the address must be {ACCEPTED_TARGETS}, not {address!r}")
    if problem := _problem(address):
        raise ValueError(f"the address must be {ACCEPTED_TARGETS}, not {address!r}: {problem}")
    return address


def proxy_options(address: str) -> dict[str, int]:
    """Returns channel options that turn the proxy off for a target on this machine, which a proxy could not reach.

    A list of addresses with one on this machine counts too: gRPC cannot send a list through a proxy.
    """
    return {"grpc.enable_http_proxy": 0} if _is_local(address) else {}


def _problem(address: str) -> str:
    """Returns what is wrong with an address; empty if nothing is."""
    scheme, path = _split(address)
    if not scheme:
        return _host_problem(address, port_is_optional=False)
    if not path:
        return f"nothing follows {scheme}:"
    if scheme in _IP_SCHEMES:
        return next(filter(None, map(_ip_problem, path.split(","))), "")
    return _host_problem(path, port_is_optional=True) if scheme == "dns" else ""


def _split(address: str) -> tuple[str, str]:
    """Returns the scheme of a target (empty if it has none) and the path after the scheme."""
    scheme, colon, rest = address.partition(":")
    if not colon or scheme not in _SCHEMES:
        return "", address
    if rest.startswith("//") and scheme not in _SOCKET_SCHEMES:
        rest = rest[2:].partition("/")[2]
    return scheme, unquote(rest)


def _host_problem(address: str, *, port_is_optional: bool) -> str:
    host = _HOST.match(address)
    port = address[host.end() :] if host else ""
    problems = {
        "it is empty": not address,
        f"leave out {address.partition('://')[0]}://": "://" in address,
        "it has spaces or control characters": " " in address or not address.isprintable(),
        "an IPv6 address needs brackets, as in [::1]:50051": not address.startswith("[") and address.count(":") > 1,
        "the host is missing, or cannot be one": host is None,
        "only an IPv6 address has brackets": host is not None and host["ip"] is not None and not _is_ip(host["ip"]),
        "the port is missing": port == ":" or (not port and not port_is_optional),
        f"the port must be 1 to {MAX_PORT}": port != "" and not _is_port(port),
    }
    return next((problem for problem, holds in problems.items() if holds), "")


def _ip_problem(address: str) -> str:
    host = _HOST.match(address)
    if host is None or not _is_ip(host["ip"] or host["name"]):
        return f"{address!r} is not an IP address with a port"
    return "" if _is_port(address[host.end() :]) else f"the port of {address!r} must be 1 to {MAX_PORT}"


def _is_port(text: str) -> bool:
    match = re.fullmatch(":([0-9]{1,5})", text)
    return match is not None and 1 <= int(match[1]) <= MAX_PORT


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_local(address: str) -> bool:
    scheme, path = _split(address)
    if scheme in _SOCKET_SCHEMES:
        return True
    hosts = map(_HOST.match, path.split(",") if scheme in _IP_SCHEMES else [path])
    return any(host is not None and _is_local_host(host["ip"] or host["name"] or "") for host in hosts)


def _is_local_host(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    # Connecting to the unspecified address, 0.0.0.0, reaches this machine.
    return bool(mapped.is_loopback or mapped.is_unspecified)
