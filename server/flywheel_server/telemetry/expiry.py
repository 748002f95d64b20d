"""Reports when certificates and keys expire, so that somebody can replace them in time."""

from collections.abc import Callable, Iterator, Mapping
from heapq import nsmallest
from pathlib import Path
from typing import Final

from cryptography import x509
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flywheel_server.system.regular_files import content_of

MAX_CALLERS: Final = 100
"""The callers with a series of their own: the ones whose keys expire first."""

_Expiry = Callable[[list[x509.Certificate]], float]


class Expiry(Collector):
    """Reads at each scrape when the files with certificates and the entries of the keys file expire.

    Arguments:
        get_key_expiries: Returns the Unix time at which the key or certificate of each caller expires, of callers whose entry
            expires and has not expired yet; see `KeyRing.expiries`.
        tls_cert: The file with the server's certificate chain; None without TLS. The chain expires with its first certificate.
        tls_client_ca: The file with the authorities that issue client certificates; None if clients need no certificate. The
            authorities expire with the last of them: an old one may stay in the file while a new one takes over.
    """

    def __init__(
        self, get_key_expiries: Callable[[], Mapping[str, float]], tls_cert: str | None, tls_client_ca: str | None
    ) -> None:
        self._get_key_expiries = get_key_expiries
        self._files = [
            _CertificateFile(setting, Path(path), expiry)
            for setting, path, expiry in (("tls_cert", tls_cert, _first), ("tls_client_ca", tls_client_ca, _last))
            if path is not None
        ]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields both metrics."""
        certificates = GaugeMetricFamily(
            "flywheel_certificate_expiry_timestamp_seconds",
            "Unix time at which the certificates in the file of this setting expire.",
            labels=["setting"],
        )
        for file in self._files:
            if (expiry := file.expiry()) is not None:
                certificates.add_metric([file.setting], expiry)
        yield certificates
        keys = GaugeMetricFamily(
            "flywheel_key_expiry_timestamp_seconds",
            f"Unix time at which the key or certificate of this caller expires: the {MAX_CALLERS} that expire first.",
            labels=["caller"],
        )
        for caller, expiry in nsmallest(MAX_CALLERS, self._get_key_expiries().items(), key=lambda item: item[1]):
            keys.add_metric([caller], expiry)
        yield keys


class _CertificateFile:
    """A file of certificates (PEM). While it is invalid or missing, its last valid content counts, as for connections."""

    def __init__(self, setting: str, path: Path, expiry: _Expiry) -> None:
        self.setting = setting
        self._path = path
        self._get_expiry = expiry
        self._read: tuple[bytes, float] | None = None

    def expiry(self) -> float | None:
        """Returns the Unix time at which the file expires; None if the file was never valid."""
        try:
            content = content_of(self._path)
            if self._read is None or self._read[0] != content:
                self._read = content, self._get_expiry(x509.load_pem_x509_certificates(content))
        except (OSError, ValueError):
            pass
        return self._read and self._read[1]


def _first(certificates: list[x509.Certificate]) -> float:
    return min(map(_timestamp, certificates))


def _last(certificates: list[x509.Certificate]) -> float:
    return max(map(_timestamp, certificates))


def _timestamp(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()
