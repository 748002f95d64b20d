"""Client certificates for tests, made byte by byte: libraries refuse to make most of the ones that matter here."""

import base64
import textwrap
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM: Final = serialization.Encoding.PEM
DER: Final = serialization.Encoding.DER

SEQUENCE, SET, INTEGER, BIT_STRING, OCTET_STRING, OBJECT_ID, BOOLEAN = 0x30, 0x31, 0x02, 0x03, 0x04, 0x06, 0x01
UTF8_STRING, PRINTABLE_STRING, TELETEX_STRING, IA5_STRING, BMP_STRING, UNIVERSAL_STRING = 0x0C, 0x13, 0x14, 0x16, 0x1E, 0x1C
GENERALIZED_TIME = 0x18

COMMON_NAME = "2.5.4.3"
ORGANIZATION = "2.5.4.10"
ALTERNATIVE_NAMES = "2.5.29.17"
BASIC_CONSTRAINTS = "2.5.29.19"
KEY_USAGE = "2.5.29.15"
ECDSA_WITH_SHA256 = "1.2.840.10045.4.3.2"


def der(tag: int, *parts: bytes) -> bytes:
    """Returns an element of DER."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content


def oid(dotted: str) -> bytes:
    first, second, *others = map(int, dotted.split("."))
    content = bytearray()
    for number in (40 * first + second, *others):
        septets = [number & 0x7F]
        while number := number >> 7:
            septets.append(0x80 | number & 0x7F)
        content.extend(reversed(septets))
    return der(OBJECT_ID, bytes(content))


def name(*attributes: tuple[str, int, bytes]) -> bytes:
    """Returns a name of attributes, each with its object identifier, the tag of its type, and its value as it is encoded."""
    return der(SEQUENCE, *(der(SET, der(SEQUENCE, oid(kind), der(tag, value))) for kind, tag, value in attributes))


def common_name(text: str) -> bytes:
    return name((COMMON_NAME, UTF8_STRING, text.encode()))


def extension(kind: str, value: bytes, *, critical: bool = False) -> bytes:
    return der(SEQUENCE, oid(kind), der(BOOLEAN, b"\xff") if critical else b"", der(OCTET_STRING, value))


def alternative_names(*names: bytes) -> bytes:
    return extension(ALTERNATIVE_NAMES, der(SEQUENCE, *names))


def email(text: str | bytes) -> bytes:
    return der(0x81, text.encode() if isinstance(text, str) else text)


def dns(text: str | bytes) -> bytes:
    return der(0x82, text.encode() if isinstance(text, str) else text)


def uri(text: str | bytes) -> bytes:
    return der(0x86, text.encode() if isinstance(text, str) else text)


def ip(address: bytes) -> bytes:
    return der(0x87, address)


def registered_id(dotted: str) -> bytes:
    return der(0x88, oid(dotted)[2:])


def directory_name(encoded: bytes) -> bytes:
    return der(0xA4, encoded)


def other_name(value: bytes, kind: str = "1.3.6.1.4.1.311.20.2.3") -> bytes:
    """Returns a name of a kind that somebody else has defined, such as the user's principal name of Windows."""
    return der(0xA0, oid(kind), der(0xA0, value))


def issue(authority: trustme.CA, subject: bytes, *extensions: bytes, chain: tuple[bytes, ...] = ()) -> trustme.LeafCert:
    """Returns a certificate of the authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer: Any = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes()).subject.public_bytes()
    now, serial = datetime.now(UTC), x509.random_serial_number()
    validity = (f"{now + timedelta(days=days):%Y%m%d%H%M%SZ}".encode() for days in (-1, 1))
    algorithm = der(SEQUENCE, oid(ECDSA_WITH_SHA256))
    to_be_signed = der(
        SEQUENCE,
        der(0xA0, der(INTEGER, b"\x02")),  # version 3
        der(INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1)),
        algorithm,
        issuer,
        der(SEQUENCE, *(der(GENERALIZED_TIME, time) for time in validity)),
        subject,
        key.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        der(0xA3, der(SEQUENCE, *extensions)) if extensions else b"",
    )
    signature = signer.sign(to_be_signed, ec.ECDSA(hashes.SHA256()))
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    own = pem(der(SEQUENCE, to_be_signed, algorithm, der(BIT_STRING, b"\0", signature)))
    return trustme.LeafCert(private, own, list(chain))


def pem(certificate: bytes) -> bytes:
    lines = textwrap.fill(base64.b64encode(certificate).decode(), 64)
    return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n".encode()


def basic_constraints(*, ca: bool) -> bytes:
    value = der(BOOLEAN, b"\xff") if ca else b""
    return extension(BASIC_CONSTRAINTS, der(SEQUENCE, value), critical=True)


def key_usage(bits: int, unused: int) -> bytes:
    return extension(KEY_USAGE, der(BIT_STRING, bytes([unused, bits])), critical=True)


def alone(*names: bytes) -> tuple[bytes, ...]:
    """Returns the parts of a certificate that has no other names than these alternative ones."""
    return name(), alternative_names(*names)


def in_subject(tag: int, value: bytes, kind: str = COMMON_NAME) -> tuple[bytes, ...]:
    return (name((kind, tag, value)),)
