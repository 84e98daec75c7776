"""A certificate authority of one's own, for brokers that speak TLS in tests.

Needs the package ``cryptography``, which this one does not bring along.
"""

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
    """PEM files of whoever shows this certificate."""

    certificate: Path
    key: Path
    """PKCS #8, as Java wants it."""


class CertificateAuthority:
    """Vouches for itself; its files are in ``folder``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        """name: of the authority, and how its files are called."""
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._key = _new_key()
        self._issued_count = 0
        self.file = self._issue(name, self._key, (), authority=True, not_after=_DAY).certificate
        """Its own certificate, PEM."""

    def issue(
        self,
        name: str,
        hosts: Sequence[str] = _LOCAL_HOSTS,
        *,
        not_after: timedelta = _DAY,
        password: str = "",
    ) -> CertificateFiles:
        """A certificate for ``name``, to be shown at ``hosts``: addresses or host names.

        ends: from now on; one that has ended already may be had, too. password: encrypts the key.
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
        building = (
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
            names = x509.SubjectAlternativeName([_general_name(one) for one in hosts])
            building = building.add_extension(names, critical=False)
        self._issued_count += 1
        stem = self._folder / f"{self._name}-{self._issued_count}-{name}"
        files = CertificateFiles(stem.with_suffix(".pem"), stem.with_suffix(".key"))
        made = building.sign(self._key, hashes.SHA256())
        files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        locked: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(password.encode())
            if password
            else serialization.NoEncryption()
        )
        files.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
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
