"""Certificate authority for brokers with TLS. Needs the package ``cryptography``."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_LOCAL_HOSTS = ("127.0.0.1", "localhost")
_DAY = timedelta(days=1)


class CertificateFiles(NamedTuple):
    """PEM files of a certificate and its key."""

    certificate: Path
    key: Path
    """PKCS #8, as Java requires."""


class CertificateAuthority:
    """A self-signed authority, with its files in ``folder``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        """name: of the authority and of its files."""
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._key = _new_key()
        self._issued_count = 0
        self.file = self._issue(name, self._key, (), authority=True, not_after=_DAY).certificate
        """Certificate of the authority, PEM."""

    def issue(
        self,
        name: str,
        hosts: Sequence[str] = _LOCAL_HOSTS,
        *,
        not_after: timedelta = _DAY,
        password: str = "",
    ) -> CertificateFiles:
        """Issue a certificate for ``name``, valid for ``hosts``: addresses or host names.

        not_after: from now on; may be negative. password: encrypts the key.
        """
        return self._issue(
            name, _new_key(), hosts, authority=False, not_after=not_after, password=password
        )

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        hosts: Sequence[str],
        *,
        authority: bool,
        not_after: timedelta,
        password: str = "",
    ) -> CertificateFiles:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_x509_name(name))
            .issuer_name(_x509_name(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _DAY)
            .not_valid_after(now + not_after)
            .add_extension(x509.BasicConstraints(authority, 0 if authority else None), True)  # noqa: FBT003
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        self._issued_count += 1
        stem = self._folder / f"{self._name}-{self._issued_count}-{name}"
        files = CertificateFiles(stem.with_suffix(".pem"), stem.with_suffix(".key"))
        certificate = builder.sign(self._key, hashes.SHA256())
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        encryption: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(password.encode())
            if password
            else serialization.NoEncryption()
        )
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )
        )
        return files


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _x509_name(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
