"""The identities in a client certificate: which of its names count, and that no caller passes for another."""

import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
import trustme
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import ANYBODY, Caller
from flywheel_server.access.client_certificates import CACHED_CERTIFICATES, _read, identities_of
from flywheel_server.access.identities import identity
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of
from google.rpc.error_details_pb2 import ErrorInfo
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.test_authentication import CALLS
from tests.server import certificates as made
from tests.server.certificates import (
    alone,
    alternative_names,
    basic_constraints,
    common_name,
    dns,
    extension,
    in_subject,
    key_usage,
    name,
    other_name,
    uri,
)
from tests.server.test_errors import details_of
from tests.server.test_tls import Engine, Files, client
from tests.serving import Target, drained, serving

MESH = "spiffe://example.org/mesh"
HOST = "mesh.example"
COMMON = "mesh client 7"
KEY = "0123456789abcdef"

REFUSED: Final = "CERTIFICATE_INVALID"
NO_CONNECTION: Final = "no connection"
NOBODY: Final = ""
STATUSES: Final = {grpc.StatusCode.UNAVAILABLE: NO_CONNECTION}

UTF8: Final = made.UTF8_STRING
CRITICAL: Final = extension("1.2.3.4.5", b"\x05\x00", critical=True)
HARMLESS: Final = extension("1.2.3.4.5", b"\x05\x00")


def beside(kind: bytes) -> tuple[bytes, ...]:
    """Returns the parts of a certificate that has a name of another kind beside its URI."""
    return alone(uri(MESH), kind)


CASES: dict[str, tuple[tuple[bytes, ...], str]] = {
    # What callers should have.
    "a SPIFFE ID": (alone(uri(MESH)), MESH),
    "a host name": (alone(dns(HOST)), HOST),
    "a common name": (in_subject(UTF8, COMMON.encode()), COMMON),
    "another URI": (alone(uri("urn:uuid:F81D4FAE")), "urn:uuid:F81D4FAE"),
    "a URI before a host name": (alone(dns(HOST), uri(MESH)), MESH),
    "a host name before a common name": ((common_name(COMMON), alternative_names(dns(HOST))), HOST),
    "a SPIFFE ID with all that SPIFFE asks for": (
        (name(), key_usage(0x80, 7), basic_constraints(ca=False), alternative_names(uri(MESH))),
        MESH,
    ),
    "an extension that nobody knows": ((*alone(uri(MESH)), HARMLESS), MESH),
    # NUL and other unprintable characters, in names of each kind.
    "NUL in a URI": (alone(uri(f"{MESH}\0.attacker.example")), REFUSED),
    "NUL in a URI that is none of SPIFFE": (alone(uri("https://example.org/a\0b")), REFUSED),
    "NUL in a host name": (alone(dns(f"{HOST}\0.attacker.example")), REFUSED),
    "NUL at the end of a host name": (alone(dns(f"{HOST}\0")), REFUSED),
    "NUL in a common name": (in_subject(UTF8, f"{COMMON}\0.attacker".encode()), REFUSED),
    "NUL in a common name of 16-bit characters": (in_subject(made.BMP_STRING, f"{COMMON}\0x".encode("utf-16-be")), REFUSED),
    "NUL in a common name that does not count": ((common_name("a\0b"), alternative_names(uri(MESH))), REFUSED),
    "NUL in another attribute": (
        (name((made.ORGANIZATION, UTF8, b"a\0b"), (made.COMMON_NAME, UTF8, COMMON.encode())),),
        REFUSED,
    ),
    "NUL in an email address": (beside(made.email("a@b.example\0.c")), REFUSED),
    "NUL in a user's name": (beside(other_name(made.der(UTF8, b"a@b\0c"))), REFUSED),
    "NUL in a user's name of 16-bit characters": (
        beside(other_name(made.der(made.BMP_STRING, "a\0".encode("utf-16-be")))),
        REFUSED,
    ),
    "NUL deep in a name that somebody defined": (
        beside(other_name(made.der(made.SEQUENCE, made.der(0xA1, made.der(0x1B, b"a\0b"))))),
        REFUSED,
    ),
    "NUL in the name of a directory": (beside(made.directory_name(common_name("a\0b"))), REFUSED),
    "a line feed": (alone(dns(f"{HOST}\n")), REFUSED),
    "an escape sequence": (in_subject(UTF8, b"mesh\x1b[2J"), REFUSED),
    "a mark that turns the direction of text": (in_subject(UTF8, "mesh\u202e7".encode()), REFUSED),
    "a space of no width": (in_subject(UTF8, "mesh\u200b".encode()), REFUSED),
    # Other kinds of names are no identity, and do no harm.
    "an email address beside": (beside(made.email("a@b.example")), MESH),
    "an address beside": (beside(made.ip(b"\x0a\x00\x00\x01")), MESH),
    "an object identifier beside": (beside(made.registered_id("1.2.3.4")), MESH),
    "the name of a directory beside": (beside(made.directory_name(common_name("a"))), MESH),
    "a user's name beside": (beside(other_name(made.der(UTF8, b"a@b.example"))), MESH),
    "a serial number of hardware beside": (
        beside(other_name(made.der(made.SEQUENCE, made.oid("1.2.3"), made.der(made.OCTET_STRING, b"\x00\x01")))),
        MESH,
    ),
    "an email address alone": ((common_name(COMMON), alternative_names(made.email("a@b.example"))), NOBODY),
    "an address alone": ((common_name(COMMON), alternative_names(made.ip(b"\x0a\x00\x00\x01"))), NOBODY),
    "an X.400 address": (beside(made.der(0xA3)), REFUSED),
    "an EDI party": (beside(made.der(0xA5, made.der(0xA1, made.der(UTF8, b"x")))), REFUSED),
    # Names that are empty, broken, or wrongly encoded.
    "no names at all": ((name(),), NOBODY),
    "no alternative names in their extension": ((common_name(COMMON), alternative_names()), NOBODY),
    "an empty host name": (alone(dns(""), uri(MESH)), REFUSED),
    "an empty URI": (alone(uri(""), dns(HOST)), REFUSED),
    "an empty common name": (in_subject(UTF8, b""), REFUSED),
    "letters that are not ASCII in a host name": (alone(dns("bücher.example")), REFUSED),
    "letters that are not even UTF-8 in a host name": (alone(dns(b"b\xfccher.example")), REFUSED),
    "letters that are not ASCII in a URI": (alone(uri("https://bücher.example/")), REFUSED),
    "letters of Latin-1 in a common name": (in_subject(made.TELETEX_STRING, b"m\xe9sh"), REFUSED),
    "half a character of 16 bits": (in_subject(made.BMP_STRING, b"\0m\0"), NO_CONNECTION),
    "a user's name that is not DER": (beside(other_name(b"\x0c\x7fa")), NO_CONNECTION),
    "alternative names that are cut off": (
        (common_name(COMMON), extension(made.ALTERNATIVE_NAMES, b"\x30\x05ab")),
        NO_CONNECTION,
    ),
    "alternative names that are nothing": ((common_name(COMMON), extension(made.ALTERNATIVE_NAMES, b"")), NO_CONNECTION),
    "alternative names twice": ((name(), alternative_names(dns(HOST)), alternative_names(uri(MESH))), NO_CONNECTION),
    "a critical extension that nobody knows": ((*alone(uri(MESH)), CRITICAL), NO_CONNECTION),
    # The same letters in other encodings.
    "a common name of 16-bit characters": (in_subject(made.BMP_STRING, COMMON.encode("utf-16-be")), COMMON),
    "a common name of 32-bit characters": (in_subject(made.UNIVERSAL_STRING, COMMON.encode("utf-32-be")), COMMON),
    "a common name of printable characters": (in_subject(made.PRINTABLE_STRING, COMMON.encode()), COMMON),
    "a common name in other letters": (in_subject(UTF8, "Bücher".encode()), NOBODY),
    "a common name in letters that look alike": (in_subject(UTF8, "mеsh client 7".encode()), NOBODY),  # noqa: RUF001 - one is Cyrillic
    # Host names.
    "a wildcard": (alone(dns(f"*.{HOST}")), NOBODY),
    "a wildcard beside": (alone(dns("*.example"), dns(HOST)), HOST),
    "a wildcard as common name": (in_subject(UTF8, b"*.example"), NOBODY),
    "a host name in capitals": (alone(dns("MESH.Example")), HOST),
    "a common name in capitals": (in_subject(UTF8, b"Mesh CLIENT 7"), COMMON),
    "a host name with a final dot": (alone(dns(f"{HOST}.")), NOBODY),
    "a host name with a leading dot": (alone(dns(f".{HOST}")), NOBODY),
    "a host name with an empty label": (alone(dns("mesh..example")), NOBODY),
    "a host name in its ASCII form": (alone(dns("XN--bcher-kva.example")), "xn--bcher-kva.example"),
    "an address as host name": (alone(dns("10.0.0.1")), NOBODY),
    "an address as common name": (in_subject(UTF8, b"10.0.0.1"), NOBODY),
    "a common name as host name": (alone(dns(COMMON)), NOBODY),
    "a URI as host name": (alone(dns(MESH)), NOBODY),
    "a host name as URI": (alone(uri(HOST)), NOBODY),
    "a common name as URI": (alone(uri(COMMON)), NOBODY),
    "a URI as common name": (in_subject(UTF8, MESH.encode()), NOBODY),
    "a URI without // as common name": (in_subject(UTF8, b"urn:uuid:F81D4FAE"), NOBODY),
    "a host name twice": (alone(dns(HOST), dns(HOST)), HOST),
    "a host name that is too long": (alone(dns(".".join(["a" * 60] * 5))), NOBODY),
    "a common name that is too long": (in_subject(UTF8, b"a" * 300), NOBODY),
    "several common names": ((name((made.COMMON_NAME, UTF8, b"other"), (made.COMMON_NAME, UTF8, COMMON.encode())),), NOBODY),
    "a country that is too long": (
        (name(("2.5.4.6", made.PRINTABLE_STRING, b"DEU"), (made.COMMON_NAME, UTF8, COMMON.encode())),),
        COMMON,
    ),
    # URIs.
    "several URIs": (alone(uri("https://a.example/"), uri("urn:b")), "https://a.example/"),
    "a URI in capitals": (alone(uri("HTTPS://A.example/")), "HTTPS://A.example/"),
    "a URI with percent signs": (alone(uri("https://a.example/%2e%2E/b")), "https://a.example/%2e%2E/b"),
    "a URI with a wrong percent sign": (alone(uri("https://a.example/%zz")), NOBODY),
    "a URI that is too long": (alone(uri("https://a.example/" + "b" * 5000)), NOBODY),
    # SPIFFE IDs: SPIFFE-ID and X509-SVID.
    "two SPIFFE IDs": (alone(uri(MESH), uri("spiffe://example.org/other")), REFUSED),
    "a SPIFFE ID twice": (alone(uri(MESH), uri(MESH)), REFUSED),
    "a SPIFFE ID and another URI": (alone(uri("https://a.example/"), uri(MESH)), REFUSED),
    "a SPIFFE ID of an authority": ((*alone(uri(MESH)), basic_constraints(ca=True)), REFUSED),
    "a SPIFFE ID whose key may sign certificates": ((*alone(uri(MESH)), key_usage(0x84, 2)), REFUSED),
    "a SPIFFE ID whose key may sign revocation lists": ((*alone(uri(MESH)), key_usage(0x82, 1)), REFUSED),
    "a SPIFFE ID in capitals": (alone(uri("SPIFFE://example.org/mesh")), REFUSED),
    "a trust domain in capitals": (alone(uri("spiffe://Example.org/mesh")), REFUSED),
    "a path in capitals": (alone(uri("spiffe://example.org/Mesh")), "spiffe://example.org/Mesh"),
    "a SPIFFE ID without a path": (alone(uri("spiffe://example.org")), REFUSED),
    "a SPIFFE ID with a final slash": (alone(uri(f"{MESH}/")), REFUSED),
    "a SPIFFE ID with an empty segment": (alone(uri("spiffe://example.org//mesh")), REFUSED),
    "a SPIFFE ID with dots for a segment": (alone(uri("spiffe://example.org/a/../mesh")), REFUSED),
    "a SPIFFE ID with percent signs": (alone(uri("spiffe://example.org/m%65sh")), REFUSED),
    "a SPIFFE ID with a percent sign and NUL": (alone(uri(f"{MESH}%00.attacker.example")), REFUSED),
    "a SPIFFE ID with a port": (alone(uri("spiffe://example.org:1/mesh")), REFUSED),
    "a SPIFFE ID with a user": (alone(uri("spiffe://a@example.org/mesh")), REFUSED),
    "a SPIFFE ID with a query": (alone(uri(f"{MESH}?a")), REFUSED),
    "a SPIFFE ID without a trust domain": (alone(uri("spiffe:///mesh")), REFUSED),
    "a SPIFFE ID that is too long": (alone(uri(f"{MESH}/{'a' * 2048}")), REFUSED),
}


@pytest.fixture(scope="module")
def clients() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
async def open_to_all(engine: Engine, files: Files, clients: trustme.CA) -> AsyncIterator[Target]:
    """A server for everybody with a certificate."""
    async with serving(engine, **files.mutual(clients), health_interval=3600) as target:
        yield target


@pytest.fixture(scope="module")
async def for_the_listed(engine: Engine, files: Files, clients: trustme.CA) -> AsyncIterator[Target]:
    """A server for the callers in a keys file: one with a key, and one for each identity that the cases expect."""
    expected = {known for _, known in CASES.values()} - {REFUSED, NO_CONNECTION, NOBODY}
    entries = [
        KeyEntry(name=f"listed-{number}", certificate=each, created=datetime.now(UTC))
        for number, each in enumerate(sorted(expected))
    ]
    key = KeyEntry(name="team-a", hash=hash_of(KEY), created=datetime.now(UTC))
    KeysFile(keys=(*entries, key)).write(files.folder / "keys.json")
    configured = {**files.mutual(clients), "api_keys_file": str(files.folder / "keys.json"), "health_interval": 3600}
    async with serving(engine, **configured) as target:
        yield target


async def outcome(
    engine: Engine, target: Target, files: Files, own: trustme.LeafCert, metadata: Any = ()
) -> Caller | str | None:
    """Returns the caller that the server takes a client with the certificate for, or why it refuses the call."""
    async with client(target.address, files.authority, own) as stub:
        try:
            await stub.GetStats(pb.GetStatsRequest(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            return str(details_of(error)[ErrorInfo].reason) if refused else STATUSES[error.code()]
        return engine.caller


@pytest.mark.parametrize("case", CASES)
async def test_a_certificate_is_taken_for_what_its_names_say_and_for_nothing_else(  # noqa: PLR0917 - fixtures
    case: str, open_to_all: Target, for_the_listed: Target, engine: Engine, files: Files, clients: trustme.CA
) -> None:
    (subject, *extensions), expected = CASES[case]
    own = made.issue(clients, subject, *extensions)
    bearer = (("authorization", f"Bearer {KEY}"),)
    by_name = await outcome(engine, open_to_all, files, own)
    by_list = await outcome(engine, for_the_listed, files, own)
    with_a_key = await outcome(engine, for_the_listed, files, own, bearer)
    match expected:
        case "CERTIFICATE_INVALID":
            assert by_name == by_list == with_a_key == REFUSED
        case "no connection":
            # Some versions of gRPC accept a certificate that they cannot read. Then the server refuses the call.
            assert {by_name, by_list, with_a_key} <= {NO_CONNECTION, REFUSED}
        case "":
            assert by_name == ANYBODY
            assert by_list == "API_KEY_MISSING"
            assert with_a_key == Caller("team-a")
        case _:
            assert by_name == Caller(expected)
            assert isinstance(by_list, Caller)
            listed = KeysFile.read(files.folder / "keys.json").keys
            assert {entry.name: entry.certificate for entry in listed}[by_list.name] == expected
            assert with_a_key == Caller("team-a")


@pytest.mark.skipif(tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 82), reason="ends the process: docs/security.md")
async def test_a_common_name_that_is_no_text_gets_no_connection(open_to_all: Target, files: Files, clients: trustme.CA) -> None:
    for tag in (made.INTEGER, made.BIT_STRING):
        own = made.issue(clients, *in_subject(tag, b"\x01"))
        async with client(open_to_all.address, files.authority, own) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetStats(pb.GetStatsRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("method", CALLS)
async def test_no_method_is_open_to_a_certificate_that_is_refused(
    method: str, open_to_all: Target, files: Files, clients: trustme.CA
) -> None:
    own = made.issue(clients, *alone(uri(f"{MESH}\0.attacker.example")))
    async with client(open_to_all.address, files.authority, own) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(getattr(stub, method)(CALLS[method]))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details_of(caught.value)[ErrorInfo].reason == "CERTIFICATE_INVALID"
    assert "attacker" not in str(caught.value)


async def test_only_the_certificate_of_the_client_itself_counts(
    open_to_all: Target, engine: Engine, files: Files, clients: trustme.CA
) -> None:
    """The names of the authorities above it are not the client's."""
    above = made.issue(clients, common_name("above"), alternative_names(dns("above.example")), basic_constraints(ca=True))
    certificate = above.cert_chain_pems[0].bytes()
    authority = trustme.CA.from_pem(certificate, above.private_key_pem.bytes())
    own = made.issue(authority, *alone(uri(MESH)), chain=(certificate,))
    nameless = made.issue(authority, name(), chain=(certificate,))
    assert await outcome(engine, open_to_all, files, own) == Caller(MESH)
    assert await outcome(engine, open_to_all, files, nameless) == ANYBODY


async def test_calls_of_one_certificate_read_it_once(
    open_to_all: Target, engine: Engine, files: Files, clients: trustme.CA
) -> None:
    for names, reason in ((alone(dns("once.example")), None), (alone(dns("once.example\0")), REFUSED)):
        own = made.issue(clients, *names)
        before = _read.cache_info().misses
        for _ in range(3):
            answer = await outcome(engine, open_to_all, files, own)
            assert answer == (reason or Caller("once.example"))
        assert _read.cache_info().misses == before + 1
    assert _read.cache_info().maxsize == CACHED_CERTIFICATES


async def test_taking_a_certificate_out_of_the_file_ends_its_calls(
    engine: Engine, files: Files, clients: trustme.CA, tmp_path: Path
) -> None:
    entry = KeyEntry(name="mesh", certificate="Mesh.EXAMPLE", created=datetime.now(UTC))
    KeysFile(keys=(entry,)).write(tmp_path / "keys.json")
    own = made.issue(clients, *alone(dns("MESH.example")))
    configured = {**files.mutual(clients), "api_keys_file": str(tmp_path / "keys.json")}
    async with serving(engine, **configured) as target, client(target.address, files.authority, own) as stub:
        stream = stub.GenerateDeltas(pb.GenerationRequest(text="wait", max_tokens=20))
        messages = aiter(stream)
        await anext(messages)
        KeysFile(keys=()).write(tmp_path / "keys.json")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(messages)
        assert details_of(caught.value)[ErrorInfo].reason == "API_KEY_REVOKED"


EVERY_KIND = alternative_names(
    uri("urn:a:b"),
    dns(HOST),
    other_name(made.der(UTF8, b"a@b.example")),
    made.email("a@b.example"),
    made.ip(b"\x0a\x00\x00\x01"),
    made.directory_name(common_name("a")),
)
PATTERN = ssl.PEM_cert_to_DER_cert(
    made.issue(trustme.CA(), common_name(COMMON), EVERY_KIND).cert_chain_pems[0].bytes().decode()
)


@given(st.lists(st.tuples(st.integers(0, len(PATTERN) - 1), st.integers(0, 255)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_whatever_a_certificate_has_in_it_its_identities_can_be_listed(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(PATTERN)
    for position, byte in changes:
        changed[position] = byte
    for found in _read(made.pem(bytes(changed))) or ():
        assert found.isascii()
        assert found.isprintable()
        assert identity(found) == found


def test_a_connection_without_a_certificate_has_no_identity() -> None:
    assert identities_of({"x509_common_name": [b"mesh"], "peer_uri": [MESH.encode()]}) == ()


def nested(depth: int) -> bytes:
    value = b""
    for _ in range(depth):
        value = made.der(made.SEQUENCE, value)
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nested(5000), (MESH,)),
        (made.der(UTF8, b"a" * 70000), (MESH,)),
        (made.der(UTF8, b"a" * 70000 + b"\0"), None),
        (b"\x0c", None),
        (b"\x0c\x05abcd", None),
        (b"\x0c\x82\xff", None),
        (b"\x1f\x81\x01\x00", None),
        (made.der(UTF8, b"\xff"), None),
        (made.der(made.IA5_STRING, b"\xe9"), None),
        (made.der(UTF8, b"a") + made.der(UTF8, b"\0"), None),
    ],
)
def test_names_that_somebody_defined_are_looked_through(
    value: bytes, expected: tuple[str, ...] | None, clients: trustme.CA
) -> None:
    assert _read(made.issue(clients, *beside(other_name(value))).cert_chain_pems[0].bytes()) == expected
