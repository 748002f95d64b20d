"""Reads the names in the client's certificate in mutual TLS.

The certificate itself is parsed, because gRPC cuts each name at its first NUL. A certificate for the name `mesh.example`, NUL,
`.attacker.example` would pass for one for `mesh.example`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Final

import structlog
from cryptography import x509
from cryptography.x509.oid import NameOID

from flywheel_server.access.identities import identity, is_host_name, is_spiffe, is_uri
from flywheel_server.errors import UnauthenticatedError

log = structlog.stdlib.get_logger(__name__)

CACHED_CERTIFICATES: Final = 512
"""Certificates whose identities are cached, a few KiB each, so that not every call parses its certificate."""

_CERTIFICATE: Final = "x509_pem_cert"
"""The connection property that holds the client's own certificate, without the rest of its chain."""


def identities_of(properties: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """Returns the identities in the client's certificate, the most specific first: URIs such as SPIFFE IDs, then host names.

    The common name counts only if it is the only one and the certificate has no alternative names (RFC 9525), because
    authorities seldom verify it. Names of other kinds are checked, but are no identities.

    Arguments:
        properties: The properties of the connection (`ServicerContext.auth_context`).

    Raises:
        UnauthenticatedError: A name of any kind is empty, cannot be read, or has an unprintable character; or the certificate
            has a SPIFFE ID but violates the rules of SPIFFE.
    """
    pem = next(iter(properties.get(_CERTIFICATE, ())), None)
    if pem is None:
        return ()
    identities = _read(pem)
    if identities is None:
        raise UnauthenticatedError("CERTIFICATE_INVALID")
    return identities


@lru_cache(CACHED_CERTIFICATES)
def _read(pem: bytes) -> tuple[str, ...] | None:
    """Returns the identities in the certificate; None if the certificate is refused."""
    try:
        with warnings.catch_warnings():
            # It warns of overlong names, which are no identities anyway.
            warnings.simplefilter("ignore")
            certificate = x509.load_pem_x509_certificate(pem)
            return tuple(dict.fromkeys(_identities(certificate)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the certificate cannot be read
        log.warning("certificate refused", error=f"{type(error).__name__}: {error}")
        return None


def _identities(certificate: x509.Certificate) -> list[str]:
    alternatives = _alternative_names(certificate)
    for text in _texts(certificate.subject, alternatives or ()):
        if not text or not text.isprintable():
            raise ValueError("a name is empty or has an unprintable character")
    if alternatives is None:
        return [*_valid_identities(_common_names(certificate.subject))]
    uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    if any(map(is_spiffe, uris)):
        _check_svid(certificate, uris)
    hosts = alternatives.get_values_for_type(x509.DNSName)
    return [*_valid_identities(filter(is_uri, uris)), *_valid_identities(filter(is_host_name, hosts))]


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    with suppress(x509.ExtensionNotFound):
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return None


def _common_names(subject: x509.Name) -> list[str]:
    """Returns the common name; nothing if it is a URI, or if there are several: it is unknown which one was verified."""
    names = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return [] if len(names) > 1 else [name for name in names if not is_uri(name)]


def _valid_identities(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts that are valid identities, in the form in which identities are compared."""
    for text in texts:
        with suppress(ValueError):
            yield identity(text)


def _check_svid(certificate: x509.Certificate, uris: list[str]) -> None:
    """Raises `ValueError` unless the certificate may identify a caller by a SPIFFE ID (X509-SVID, 5.2)."""
    if len(uris) > 1:
        raise ValueError("a certificate with a SPIFFE ID must not have another URI")
    identity(uris[0])
    with suppress(x509.ExtensionNotFound):
        if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("a certificate of an authority identifies no caller by its SPIFFE ID")
    with suppress(x509.ExtensionNotFound):
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if usage.key_cert_sign or usage.crl_sign:
            raise ValueError("a key that may sign certificates identifies no caller by its SPIFFE ID")


def _texts(subject: x509.Name, alternatives: Iterable[x509.GeneralName]) -> Iterator[str]:
    """Yields all text in the names. Raises `ValueError` for text that cannot be read."""
    yield from _texts_of(subject)
    for name in alternatives:
        match name:
            case x509.DNSName() | x509.UniformResourceIdentifier() | x509.RFC822Name():
                if not name.value.isascii():
                    raise ValueError("a name has characters that are not ASCII")
                yield name.value
            case x509.DirectoryName():
                yield from _texts_of(name.value)
            case x509.OtherName():
                yield from _strings(name.value)
            case _:
                # An address or an object identifier has no text.
                pass


def _texts_of(name: x509.Name) -> Iterator[str]:
    return (attribute.value for attribute in name if isinstance(attribute.value, str))


_STRINGS: Final = {
    0x0C: "utf-8",  # UTF8String
    0x12: "ascii",  # NumericString
    0x13: "ascii",  # PrintableString
    0x14: "ascii",  # TeletexString
    0x16: "ascii",  # IA5String
    0x1A: "ascii",  # VisibleString
    0x1B: "ascii",  # GeneralString
    0x1C: "utf-32-be",  # UniversalString
    0x1E: "utf-16-be",  # BMPString
}
"""The encodings of the ASN.1 string types, by tag."""

_CONSTRUCTED: Final = 0x20
_LONG_FORM: Final = 0x80
_HIGH_TAG: Final = 0x1F


def _strings(der: bytes) -> Iterator[str]:
    """Yields all strings in a DER value, at any depth: each kind of `otherName` defines a structure of its own.

    Raises `ValueError` if the value is not DER.
    """
    pending = [memoryview(der)]
    while pending:
        data = pending.pop()
        while data:
            tag, content, data = _first_element(data)
            if tag & _CONSTRUCTED:
                pending.append(content)
            elif tag in _STRINGS:
                yield str(content, _STRINGS[tag])


def _first_element(data: memoryview) -> tuple[int, memoryview, memoryview]:
    """Returns the tag and the content of the first element, and what follows it (X.690, 8.1)."""
    if len(data) < 2 or data[0] & _HIGH_TAG == _HIGH_TAG:  # noqa: PLR2004 - a tag and a length
        raise ValueError("a name is not in DER")
    tag, length, start = data[0], data[1], 2
    if length & _LONG_FORM:
        start += length - _LONG_FORM
        length = int.from_bytes(data[2:start])
    end = start + length
    if end > len(data):
        raise ValueError("a name is not in DER")
    return tag, data[start:end], data[end:]
