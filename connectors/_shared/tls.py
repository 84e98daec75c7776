"""TLS as a client of a broker: certificates read, and what goes wrong told with its cure."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_EXPIRED, _NOT_YET_VALID = 10, 9
_UNTRUSTED = frozenset({2, 18, 19, 20, 21})
_HOSTNAME_MISMATCH = frozenset({62, 64})
"""OpenSSL's numbers of what is wrong with a certificate (``openssl verify``)."""

_CLIENT_CERTIFICATE_MISSING = re.compile(
    r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE)$"
)
_CLIENT_CERTIFICATE_REJECTED = re.compile(
    r"ALERT_(\w*CERTIFICATE_\w+|UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR)$"
)
_NOT_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST|HTTPS_PROXY_REQUEST")
_NO_COMMON_PROTOCOL = re.compile(r"UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|NO_SHARED|NO_PROTOCOLS")


class SettingNames(NamedTuple):
    """What the settings are called that a cure is about."""

    address: str
    encryption: str
    """By which it is chosen whether to encrypt."""
    cafile: str
    certfile: str
    key_password: str


class ConnectionProblem(NamedTuple):
    """What keeps us and a broker from each other."""

    message: str
    remedy: str
    permanent: bool = False
    """Whether it is the same next time, unless somebody changes something."""

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class CertificateError(OSError):
    """A file that TLS needs cannot be used; one clause for people."""


def any_remote(*hosts: str) -> bool:
    """Whether what is sent to any of these without TLS can be read on its way."""
    return not all(host in {"localhost", "::1"} or host.startswith("127.") for host in hosts)


def create_context(
    cafile: Path | None,
    certfile: Path | None,
    keyfile: Path | None,
    key_password: str,
    names: SettingNames,
) -> ssl.SSLContext:
    """What encrypts, and checks who answers: always its authority and its name.

    cafile: who vouches for the broker; None: the system's authorities. certfile, keyfile: ours, if
    any; without keyfile the key is in certfile. Reads the files. Raises CertificateError.
    """
    try:
        made = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise CertificateError(f"{cafile}: {_file_error(error, 'no certificate in it')}") from None
    if certfile is None:
        return made
    try:
        # Never without a password, or OpenSSL asks for one at the terminal.
        made.load_cert_chain(certfile, keyfile, password=key_password)
    except OSError as error:
        why = _file_error(error, f"it is not PEM, or {names.key_password} is not its password")
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            why = f"it is not the key of {certfile}"
        raise CertificateError(f"{keyfile or certfile}: {why}") from None
    return made


def explain(
    error: BaseException, names: SettingNames, cafile: Path | None, certfile: Path | None
) -> ConnectionProblem | None:
    """What ``error``, or what it came from, means; None if it has nothing to do with TLS."""
    for one in exception_chain(error):
        if isinstance(one, CertificateError):
            return ConnectionProblem(
                f"certificate or key cannot be used: {one}", "", permanent=True
            )
        if isinstance(one, ssl.SSLCertVerificationError):
            return _explain_broker_certificate(one, names, cafile)
        if isinstance(one, ssl.SSLError):
            return _explain_handshake(one, names, certfile)
    return None


def _explain_broker_certificate(
    error: ssl.SSLCertVerificationError, names: SettingNames, cafile: Path | None
) -> ConnectionProblem:
    """Their certificate, as we see it."""
    number = error.verify_code
    if number in {_EXPIRED, _NOT_YET_VALID}:
        what = "has expired" if number == _EXPIRED else "is not valid yet"
        cure = "the broker needs a new one, if this machine's clock is right"
    elif number in _HOSTNAME_MISMATCH:
        message = error.verify_message
        what = "is for another name" + (f": {message.rstrip('.')}" if message else "")
        cure = f"use a name that it holds in {names.address}, or have one made that holds ours"
    elif number in _UNTRUSTED:
        ours = str(cafile) if cafile else "the system's authorities"
        what = f"is signed by nobody that we trust ({ours})"
        cure = f"set {names.cafile} to the certificate of the authority that signed it"
    else:
        what, cure = f"does not hold: {error.verify_message}", f"see {names.cafile}"
    return ConnectionProblem(f"the broker's certificate {what}", cure, permanent=True)


def _explain_handshake(
    error: ssl.SSLError, names: SettingNames, certfile: Path | None
) -> ConnectionProblem:
    reason = error.reason or ""
    if certfile is None and _CLIENT_CERTIFICATE_MISSING.search(reason):
        cure = f"set {names.certfile} to one that it trusts"
        return ConnectionProblem("the broker asks for a certificate of ours", cure, permanent=True)
    if _CLIENT_CERTIFICATE_MISSING.search(reason) or _CLIENT_CERTIFICATE_REJECTED.search(reason):
        cure = f"see whether {certfile} is still valid, and signed by whom the broker trusts"
        said = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        return ConnectionProblem(
            f"the broker turns our certificate down ({said})", cure, permanent=True
        )
    if _NOT_TLS.search(reason):
        cure = f"see {names.address} and {names.encryption}"
        return ConnectionProblem("no TLS is spoken there", cure, permanent=True)
    if _NO_COMMON_PROTOCOL.search(reason):
        cure = "let the broker speak TLS 1.2 or 1.3"
        return ConnectionProblem(
            f"no TLS in common ({reason.replace('_', ' ').lower()})", cure, permanent=True
        )
    said = reason.replace("_", " ").lower() or str(error)
    return ConnectionProblem(f"TLS failed: {said}", f"see {names.encryption} and {names.cafile}")


def _file_error(error: OSError, default: str) -> str:
    return default if isinstance(error, ssl.SSLError) else error.strerror or str(error)


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
