"""Serves TLS with certificate files that are reloaded when they change, so that renewal needs no restart."""

import ssl
from pathlib import Path

import grpc
import structlog

from flywheel_server.system.regular_files import content_of
from flywheel_server.system.reloading import Reloadable

log = structlog.stdlib.get_logger(__name__)


def server_credentials(cert: str, key: str, client_ca: str | None = None) -> grpc.ServerCredentials:
    """Returns credentials that use the current content of the files for each new connection.

    Existing connections stay. If the files become invalid or incomplete, their last valid content stays in use. All files are
    PEM.

    Arguments:
        cert: The file with the certificate chain (`FLYWHEEL_TLS_CERT`).
        key: The file with its private key, not encrypted (`FLYWHEEL_TLS_KEY`).
        client_ca: The file with the authorities that issue client certificates (`FLYWHEEL_TLS_CLIENT_CA`). Clients must have a
            certificate of one of them. None if clients need no certificate.

    Raises:
        OSError: A file cannot be read.
        ValueError: The content of a file is invalid, or certificate and key do not match.
    """
    paths = [Path(file) for file in (cert, key, client_ca) if file is not None]
    certificates = Reloadable("TLS certificates", paths, lambda: _load(*paths))

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        if configuration := certificates.load_if_changed():
            log.info("TLS certificates reloaded")
        return configuration

    # gRPC calls `fetch` for each connection, on a thread of its own.
    return grpc.dynamic_ssl_server_credentials(
        certificates.first,
        fetch,  # type: ignore[arg-type] # None means that nothing has changed
        require_client_authentication=client_ca is not None,
    )


def _load(cert: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCertificateConfiguration:
    chain, private_key = _read(cert, "FLYWHEEL_TLS_CERT"), _read(key, "FLYWHEEL_TLS_KEY")
    authorities = _read(client_ca, "FLYWHEEL_TLS_CLIENT_CA") if client_ca else None
    # gRPC does not validate the files, and would fail at each connection. OpenSSL reports what is wrong.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password argument, OpenSSL would ask for the password of an encrypted key at the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"FLYWHEEL_TLS_CERT ({cert}) and FLYWHEEL_TLS_KEY ({key}) are not a certificate chain and its private key, without "
            f"a password: {_reason(error)}"
        ) from None
    if (chain, private_key) != (content_of(cert), content_of(key)):
        raise ValueError(f"{cert} and {key} change while they are read")
    if authorities is not None:
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"FLYWHEEL_TLS_CLIENT_CA ({client_ca}) has no certificates: {_reason(error)}") from None
    return grpc.ssl_server_certificate_configuration([(private_key, chain)], authorities)


def _read(file: Path, setting: str) -> bytes:
    try:
        return content_of(file)
    except OSError as error:
        raise OSError(f"{setting} cannot be read ({file}): {error.strerror}") from None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).lower().replace("_", " ")
