"""Defines which texts identify a caller with a certificate, and how these identities are compared.

An identity is a URI, such as a SPIFFE ID, or a name: a host name or, in a certificate without alternative names, a common name.
It is ASCII. URIs are compared character by character, without decoding. Names are compared case-insensitively, as in DNS
(RFC 4343) and X.520. No text is both a URI and a name, so a certificate with the one never passes for the other.
"""

import ipaddress
import re
from typing import Final

MAX_URI_CHARACTERS: Final = 2048
"""The maximum length of a SPIFFE ID (SPIFFE-ID, 2.3)."""

MAX_NAME_CHARACTERS: Final = 253
"""The maximum length of a host name (RFC 1035)."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_URI: Final = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
_SPIFFE_ID: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
_NAME: Final = re.compile(r"[!-~]+(?: [!-~]+)*")
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def is_uri(text: str) -> bool:
    """Returns whether the text begins with a scheme, as URIs do (RFC 3986)."""
    return _SCHEME.match(text) is not None


def is_spiffe(text: str) -> bool:
    """Returns whether the text has the scheme of a SPIFFE ID, valid or not."""
    scheme = _SCHEME.match(text)
    return scheme is not None and scheme[1].lower() == "spiffe"


def is_host_name(text: str) -> bool:
    """Returns whether the text is an ASCII host name without wildcards. Underscores are accepted."""
    return _HOST_NAME.fullmatch(text) is not None


def identity(text: str) -> str:
    """Returns the identity in the form in which identities are compared: a name in lower case, a URI unchanged.

    Raises:
        ValueError: The text is not a valid identity. The message says what an identity must be.
    """
    if _is_address(text):
        raise ValueError("must be a URI or a host name: an IP address is no identity")
    return _uri(text) if is_uri(text) else _name(text)


def _uri(text: str) -> str:
    if is_spiffe(text) and not _SPIFFE_ID.fullmatch(text):
        raise ValueError(
            "must be a valid SPIFFE ID, such as spiffe://example.org/mesh: scheme and trust domain in lower case, a path, and "
            "in both only letters, digits, dots, dashes and underscores"
        )
    if len(text) > MAX_URI_CHARACTERS or not _URI.fullmatch(text):
        raise ValueError(f"must be 1 to {MAX_URI_CHARACTERS} of the characters that a URI may have (RFC 3986)")
    return text


def _name(text: str) -> str:
    if len(text) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(text):
        raise ValueError(
            f"must be a URI, or a name of 1 to {MAX_NAME_CHARACTERS} printable ASCII characters with single spaces within; a "
            "host name in other letters has an ASCII form, which begins with xn--"
        )
    if "*" in text:
        raise ValueError("must not have a wildcard, which stands for many hosts: list each host by its own name")
    if text.startswith(".") or text.endswith("."):
        raise ValueError("must not begin or end with a dot")
    return text.lower()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
