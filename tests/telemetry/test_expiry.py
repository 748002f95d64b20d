"""When certificates and keys expire."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from flywheel_server.access.keys import KeyRing
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of
from flywheel_server.telemetry.expiry import MAX_CALLERS, Expiry

NOW = datetime.now(UTC).replace(microsecond=0)
DAYS = [NOW + timedelta(days=days) for days in range(1, 4)]


def samples(expiry: Expiry) -> dict[tuple[str, str], float]:
    """Returns the value of each sample by the ends of its name and of its label."""
    expiry.refresh()
    return {
        (family.name.split("_")[1], value): sample.value
        for family in expiry.collect()
        for sample in family.samples
        for value in sample.labels.values()
    }


def write(path: Path, *chain: bytes) -> str:
    path.write_bytes(b"".join(chain))
    return str(path)


def chain_until(*ends: datetime) -> list[bytes]:
    authority = trustme.CA()
    return [authority.issue_cert("localhost", not_after=end).cert_chain_pems[0].bytes() for end in ends]


def no_keys(count: int) -> list[tuple[float, str]]:
    return []


def test_a_chain_expires_with_its_first_certificate_and_authorities_with_their_last(tmp_path: Path) -> None:
    cert, authorities = (write(tmp_path / name, *chain_until(*DAYS)) for name in ("cert.pem", "ca.pem"))
    assert samples(Expiry(no_keys, cert, authorities)) == {
        ("certificate", "tls_cert"): DAYS[0].timestamp(),
        ("certificate", "tls_client_ca"): DAYS[2].timestamp(),
    }


def test_without_tls_and_keys_there_are_no_samples() -> None:
    assert samples(Expiry(no_keys, None, None)) == {}


@pytest.mark.parametrize("broken", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", None])
def test_a_certificate_is_read_again_and_the_last_valid_one_counts(tmp_path: Path, broken: bytes | None) -> None:
    path = tmp_path / "cert.pem"
    expiry = Expiry(no_keys, str(path), None)
    assert samples(expiry) == {}
    for end in DAYS[:2]:
        write(path, *chain_until(end))
        assert samples(expiry) == {("certificate", "tls_cert"): end.timestamp()}
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
    assert samples(expiry) == {("certificate", "tls_cert"): DAYS[1].timestamp()}


def test_keys_that_have_expired_or_never_expire_are_left_out(tmp_path: Path) -> None:
    ends = {"gone": NOW - timedelta(seconds=1), "soon": DAYS[0], "later": DAYS[1], "never": None}
    entries = [KeyEntry(name=name, hash=hash_of(name), created=NOW, expires=end) for name, end in ends.items()]
    entries.append(KeyEntry(name="mesh", certificate="spiffe://a.example/b", created=NOW, expires=DAYS[2]))
    KeysFile(keys=tuple(entries)).write(path := tmp_path / "keys.json")
    ring = KeyRing(["a key of the variable"], str(path))
    assert samples(Expiry(ring.next_to_expire, None, None)) == {
        ("key", name): end.timestamp() for name, end in (("soon", DAYS[0]), ("later", DAYS[1]), ("mesh", DAYS[2]))
    }


def test_only_the_next_keys_to_expire_have_samples(tmp_path: Path) -> None:
    ends = {f"caller-{number}": NOW + timedelta(hours=1 + number) for number in range(10 * MAX_CALLERS)}
    entries = tuple(KeyEntry(name=name, hash=hash_of(name), created=NOW, expires=end) for name, end in ends.items())
    KeysFile(keys=entries[::-1]).write(path := tmp_path / "keys.json")
    assert samples(Expiry(KeyRing(file=str(path)).next_to_expire, None, None)) == {
        ("key", name): ends[name].timestamp() for name in list(ends)[:MAX_CALLERS]
    }
