"""Identities that may stand in the keys file, and which certificates have them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from flywheel_server.access.client_certificates import _read
from flywheel_server.access.identities import identity
from flywheel_server.access.keys_file import KeyEntry, KeysFile

from tests.server import certificates as made
from tests.server.certificates import UTF8_STRING, alone, dns, in_subject, uri

MESH = "spiffe://example.org/mesh"

ENTRIES: dict[str, str | None] = {
    MESH: MESH,
    "spiffe://example.org/Mesh": "spiffe://example.org/Mesh",
    "urn:uuid:F81D4FAE": "urn:uuid:F81D4FAE",
    "HTTPS://A.example/%2e": "HTTPS://A.example/%2e",
    "Mesh.Example": "mesh.example",
    "Mesh Client 7": "mesh client 7",
    "XN--bcher-kva.example": "xn--bcher-kva.example",
    "my_service.example": "my_service.example",
    "": "printable ASCII",
    " mesh": "printable ASCII",
    "mesh ": "printable ASCII",
    "mesh\0x": "printable ASCII",
    "mesh\n": "printable ASCII",
    "bücher.example": "xn--",
    "a" * 254: "1 to 253",
    "*.example.org": "wildcard",
    "mesh.example.": "dot",
    ".mesh.example": "dot",
    "10.0.0.1": "IP address",
    "::1": "IP address",
    "fe80::1": "IP address",
    "spiffe://": "SPIFFE ID",
    "spiffe://example.org": "SPIFFE ID",
    "spiffe://Example.org/mesh": "SPIFFE ID",
    "SPIFFE://example.org/mesh": "SPIFFE ID",
    "spiffe://example.org/mesh/": "SPIFFE ID",
    "spiffe://example.org/mesh\n": "SPIFFE ID",
    "spiffe://example.org/m%65sh": "SPIFFE ID",
    "spiffe:example.org/mesh": "SPIFFE ID",
    f"{MESH}\0": "SPIFFE ID",
    f"{MESH}/{'a' * 2048}": "2048",
    "https://a.example/\0": "RFC 3986",
    "https://a.example/a b": "RFC 3986",
    "https://a.example/%zz": "RFC 3986",
    "https://bücher.example/": "RFC 3986",
    "https://a.example/" + "b" * 2048: "2048",
}


@pytest.mark.parametrize("text", ENTRIES)
def test_an_identity_that_no_certificate_can_have_is_refused_with_a_reason(text: str) -> None:
    accepted = {text: known for text, known in ENTRIES.items() if known == text or known == text.lower()}
    if text in accepted:
        assert identity(text) == accepted[text]
        assert identity(identity(text)) == identity(text)
    else:
        with pytest.raises(ValueError, match=ENTRIES[text]):
            identity(text)


@pytest.mark.parametrize("text", [text for text, known in ENTRIES.items() if known == text or known == text.lower()])
def test_each_valid_identity_can_be_in_a_certificate(text: str) -> None:
    clients = trustme.CA()
    kinds = (alone(uri(text)), alone(dns(text)), in_subject(UTF8_STRING, text.encode()))
    entered = [_read(made.issue(clients, *parts).cert_chain_pems[0].bytes()) for parts in kinds]
    assert (identity(text),) in entered


def test_two_entries_for_the_same_certificate_are_refused() -> None:
    one, other = (
        KeyEntry(name=caller, certificate=text, created=datetime.now(UTC))
        for caller, text in (("a", "mesh.example"), ("b", "Mesh.EXAMPLE"))
    )
    with pytest.raises(ValueError, match="a and b have the same certificate"):
        KeysFile(keys=(one, other))


def test_an_identity_edited_by_hand_is_read_in_lower_case(tmp_path: Path) -> None:
    text = b'{"keys": [{"name": "mesh", "certificate": "Mesh.Example", "created": "2026-01-01T00:00:00Z"}]}'
    assert KeysFile.parse(text).keys[0].certificate == "mesh.example"
    with pytest.raises(ValueError, match=r"entry 1 \(mesh\): certificate: must not have a wildcard"):
        KeysFile.parse(text.replace(b"Mesh.", b"*."))
