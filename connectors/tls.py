"""TLS as a client of a broker: certificates read, and what goes wrong told with its cure."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_EXPIRED, _NOT_YET = 10, 9
_STRANGERS = frozenset({2, 18, 19, 20, 21})
_OTHER_HOST = frozenset({62, 64})
"""OpenSSL's numbers of what is wrong with a certificate (``openssl verify``)."""

_OURS_MISSING = re.compile(r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE)$")
_OURS_REFUSED = re.compile(r"ALERT_(\w*CERTIFICATE_\w+|UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR)$")
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST|HTTPS_PROXY_REQUEST")
_NO_COMMON = re.compile(r"UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|NO_SHARED|NO_PROTOCOLS")


class Names(NamedTuple):
    """What the settings are called that a cure is about."""

    address: str
    encrypt: str
    """By which it is chosen whether to encrypt."""
    cafile: str
    certfile: str
    key_password: str


class Fault(NamedTuple):
    """What keeps us and a broker from each other."""

    what: str
    cure: str
    refused: bool = False
    """Whether it is the same next time, unless somebody changes something."""

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}" if self.cure else self.what


class CertificateError(OSError):
    """A file that TLS needs cannot be used; one clause for people."""


def readable(*hosts: str) -> bool:
    """Whether what is sent to any of these without TLS can be read on its way."""
    return not all(host in {"localhost", "::1"} or host.startswith("127.") for host in hosts)


def context(
    cafile: Path | None,
    certfile: Path | None,
    keyfile: Path | None,
    key_password: str,
    names: Names,
) -> ssl.SSLContext:
    """What encrypts, and checks who answers: always its authority and its name.

    cafile: who vouches for the broker; None: the system's authorities. certfile, keyfile: ours, if
    any; without keyfile the key is in certfile. Reads the files. Raises CertificateError.
    """
    try:
        made = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise CertificateError(f"{cafile}: {_unusable(error, 'no certificate in it')}") from None
    if certfile is None:
        return made
    try:
        # Never without a password, or OpenSSL asks for one at the terminal.
        made.load_cert_chain(certfile, keyfile, password=key_password)
    except OSError as error:
        why = _unusable(error, f"it is not PEM, or {names.key_password} is not its password")
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            why = f"it is not the key of {certfile}"
        raise CertificateError(f"{keyfile or certfile}: {why}") from None
    return made


def fault(
    error: BaseException, names: Names, cafile: Path | None, certfile: Path | None
) -> Fault | None:
    """What ``error``, or what it came from, means; None if it has nothing to do with TLS."""
    for one in origins(error):
        if isinstance(one, CertificateError):
            return Fault(f"certificate or key cannot be used: {one}", "", refused=True)
        if isinstance(one, ssl.SSLCertVerificationError):
            return _of_theirs(one, names, cafile)
        if isinstance(one, ssl.SSLError):
            return _of_handshake(one, names, certfile)
    return None


def _of_theirs(error: ssl.SSLCertVerificationError, names: Names, cafile: Path | None) -> Fault:
    """Their certificate, as we see it."""
    number = error.verify_code
    if number in {_EXPIRED, _NOT_YET}:
        what = "has expired" if number == _EXPIRED else "is not valid yet"
        cure = "the broker needs a new one, if this machine's clock is right"
    elif number in _OTHER_HOST:
        message = error.verify_message
        what = "is for another name" + (f": {message.rstrip('.')}" if message else "")
        cure = f"use a name that it holds in {names.address}, or have one made that holds ours"
    elif number in _STRANGERS:
        ours = str(cafile) if cafile else "the system's authorities"
        what = f"is signed by nobody that we trust ({ours})"
        cure = f"set {names.cafile} to the certificate of the authority that signed it"
    else:
        what, cure = f"does not hold: {error.verify_message}", f"see {names.cafile}"
    return Fault(f"the broker's certificate {what}", cure, refused=True)


def _of_handshake(error: ssl.SSLError, names: Names, certfile: Path | None) -> Fault:
    reason = error.reason or ""
    if certfile is None and _OURS_MISSING.search(reason):
        cure = f"set {names.certfile} to one that it trusts"
        return Fault("the broker asks for a certificate of ours", cure, refused=True)
    if _OURS_MISSING.search(reason) or _OURS_REFUSED.search(reason):
        cure = f"see whether {certfile} is still valid, and signed by whom the broker trusts"
        said = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        return Fault(f"the broker turns our certificate down ({said})", cure, refused=True)
    if _NO_TLS.search(reason):
        cure = f"see {names.address} and {names.encrypt}"
        return Fault("no TLS is spoken there", cure, refused=True)
    if _NO_COMMON.search(reason):
        cure = "let the broker speak TLS 1.2 or 1.3"
        return Fault(f"no TLS in common ({reason.replace('_', ' ').lower()})", cure, refused=True)
    said = reason.replace("_", " ").lower() or str(error)
    return Fault(f"TLS failed: {said}", f"see {names.encrypt} and {names.cafile}")


def _unusable(error: OSError, otherwise: str) -> str:
    return otherwise if isinstance(error, ssl.SSLError) else error.strerror or str(error)


def origins(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
