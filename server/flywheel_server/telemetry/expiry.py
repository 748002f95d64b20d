"""Reports when certificates and keys expire, so that somebody can replace them in time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography import x509
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flywheel_server.system.regular_files import content_of

MAX_CALLERS: Final = 100
"""The callers with a series of their own: the next ones whose keys expire."""

_Expiry = Callable[[list[x509.Certificate]], float]


class Expiry(Collector):
    """Says when the certificates of the server and the keys of callers expire.

    Arguments:
        next_to_expire: Returns the Unix times at which the keys or certificates of so many callers expire, and the callers'
            names, the earliest first; see `KeyRing.next_to_expire`.
        tls_cert: The file with the server's certificate chain; None without TLS. The chain expires with its first certificate.
        tls_client_ca: The file with the authorities that issue client certificates; None if clients need no certificate. The
            authorities expire with the last of them: an old one may stay in the file while a new one takes over.
    """

    def __init__(
        self, next_to_expire: Callable[[int], Sequence[tuple[float, str]]], tls_cert: str | None, tls_client_ca: str | None
    ) -> None:
        self._next_to_expire = next_to_expire
        self._files = [
            _CertificateFile(setting, Path(path), expiry)
            for setting, path, expiry in (("tls_cert", tls_cert, _first), ("tls_client_ca", tls_client_ca, _last))
            if path is not None
        ]

    def refresh(self) -> None:
        """Reads the files with certificates. To be called before the metrics are collected, on a thread of its own."""
        for file in self._files:
            file.refresh()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields both metrics."""
        certificates = GaugeMetricFamily(
            "flywheel_certificate_expiry_timestamp_seconds",
            "Unix time at which the certificates in the file of this setting expire.",
            labels=["setting"],
        )
        for file in self._files:
            if file.expiry is not None:
                certificates.add_metric([file.setting], file.expiry)
        yield certificates
        keys = GaugeMetricFamily(
            "flywheel_key_expiry_timestamp_seconds",
            f"Unix time at which the key or certificate of this caller expires, for the next {MAX_CALLERS} to expire.",
            labels=["caller"],
        )
        for expiry, caller in self._next_to_expire(MAX_CALLERS):
            keys.add_metric([caller], expiry)
        yield keys


class _CertificateFile:
    """A file of certificates (PEM).

    Attributes:
        setting: The setting that names the file.
        expiry: The Unix time at which the file's last valid content expires; None if the file was never valid. Connections use
            that content too.
    """

    def __init__(self, setting: str, path: Path, get_expiry: _Expiry) -> None:
        self.setting = setting
        self.expiry: float | None = None
        self._path = path
        self._get_expiry = get_expiry
        self._content = b""

    def refresh(self) -> None:
        """Reads the file."""
        with suppress(OSError, ValueError):
            content = content_of(self._path)
            if content != self._content:
                self.expiry = self._get_expiry(x509.load_pem_x509_certificates(content))
                self._content = content


def _first(certificates: list[x509.Certificate]) -> float:
    return min(map(_timestamp, certificates))


def _last(certificates: list[x509.Certificate]) -> float:
    return max(map(_timestamp, certificates))


def _timestamp(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()
