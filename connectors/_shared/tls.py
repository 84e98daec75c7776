"""TLS for clients of brokers: certificate files, and explanations of failures with remedies."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kronos_stream.interfaces.diagnostics import Finding

_EXPIRED, _NOT_YET_VALID = 10, 9
_UNTRUSTED = frozenset({2, 18, 19, 20, 21})
_HOSTNAME_MISMATCH = frozenset({62, 64})
"""Verification results of OpenSSL (``openssl verify``)."""

_CLIENT_CERTIFICATE_MISSING = re.compile(
    r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE)$"
)
_CLIENT_CERTIFICATE_REJECTED = re.compile(
    r"ALERT_(\w*CERTIFICATE_\w+|UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR)$"
)
_NOT_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST|HTTPS_PROXY_REQUEST")
_NO_COMMON_PROTOCOL = re.compile(r"UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|NO_SHARED|NO_PROTOCOLS")


class SettingNames(NamedTuple):
    """Names of the settings that remedies refer to."""

    address: str
    encryption: str
    """The setting that enables TLS."""
    cafile: str
    certfile: str
    key_password: str


class ConnectionProblem(NamedTuple):
    """Why a broker cannot be used, and the remedy."""

    message: str
    remedy: str
    permanent: bool = False
    """True if retries fail until the configuration changes."""

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class CertificateError(OSError):
    """A certificate or key file cannot be used."""


class TlsFiles(NamedTuple):
    """Certificate files of a client, PEM."""

    cafile: Path | None
    """Authorities that sign the broker's certificate; None: the system's."""
    certfile: Path | None
    """Our certificate, if brokers require one."""
    keyfile: Path | None
    """Its key; None if ``certfile`` contains it."""
    key_password: str
    names: SettingNames

    def validate(self, plaintext: str) -> None:
        """Raise ValueError if a file cannot be used, or has no effect.

        plaintext: why the connection is not encrypted; empty if it is.
        """
        paths = [path for path in self[:3] if path is not None]
        if plaintext:
            if paths:
                raise ValueError(f"a certificate is set, but {plaintext}")
            return
        if self.keyfile and not self.certfile:
            field = self.names.certfile.rpartition("__")[2].lower()
            raise ValueError(f"{field.replace('cert', 'key')} is set, but {field} is not")
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        try:
            self.create_context()
        except CertificateError as error:
            raise ValueError(str(error)) from None

    def create_context(self) -> ssl.SSLContext:
        """Read the files. The context verifies the broker's certificate and host name.

        Raises CertificateError.
        """
        try:
            context = ssl.create_default_context(cafile=self.cafile)
        except OSError as error:
            reason = _file_error(error, "no certificate in it")
            raise CertificateError(f"{self.cafile}: {reason}") from None
        if self.certfile is None:
            return context
        try:
            # Without a password argument, OpenSSL would ask at the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, password=self.key_password)
        except OSError as error:
            wrong_password = f"it is not PEM, or {self.names.key_password} is not its password"
            reason = _file_error(error, wrong_password)
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                reason = f"it is not the key of {self.certfile}"
            raise CertificateError(f"{self.keyfile or self.certfile}: {reason}") from None
        return context

    def explain(self, error: BaseException) -> ConnectionProblem | None:
        """Explain ``error`` by the TLS failure that caused it; None if there is none."""
        for cause in exception_chain(error):
            if isinstance(cause, CertificateError):
                message = f"certificate or key cannot be used: {cause}"
                return ConnectionProblem(message, "", permanent=True)
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._explain_broker_certificate(cause)
            if isinstance(cause, ssl.SSLError):
                return self._explain_handshake(cause)
        return None

    def _explain_broker_certificate(self, error: ssl.SSLCertVerificationError) -> ConnectionProblem:
        names, number = self.names, error.verify_code
        if number in {_EXPIRED, _NOT_YET_VALID}:
            reason = "has expired" if number == _EXPIRED else "is not valid yet"
            remedy = "the broker needs a new one, unless this machine's clock is wrong"
        elif number in _HOSTNAME_MISMATCH:
            detail = error.verify_message.rstrip(".") if error.verify_message else ""
            reason = "is for another host name" + (f": {detail}" if detail else "")
            remedy = f"use a name of the certificate in {names.address}, or replace the certificate"
        elif number in _UNTRUSTED:
            trusted = str(self.cafile) if self.cafile else "the system's authorities"
            reason = f"is not signed by a trusted authority ({trusted})"
            remedy = f"set {names.cafile} to the certificate of the authority that signed it"
        else:
            reason, remedy = f"is invalid: {error.verify_message}", f"see {names.cafile}"
        return ConnectionProblem(f"the broker's certificate {reason}", remedy, permanent=True)

    def _explain_handshake(self, error: ssl.SSLError) -> ConnectionProblem:
        names, reason = self.names, error.reason or ""
        words = reason.replace("_", " ").lower()
        missing = bool(_CLIENT_CERTIFICATE_MISSING.search(reason))
        if missing and self.certfile is None:
            message = "the broker requires a client certificate"
            remedy = f"set {names.certfile} to one that it trusts"
        elif missing or _CLIENT_CERTIFICATE_REJECTED.search(reason):
            message = f"the broker rejects our certificate ({words.rpartition('alert ')[2]})"
            remedy = f"check that {self.certfile} is valid and that the broker trusts its authority"
        elif _NOT_TLS.search(reason):
            message = "the broker does not use TLS on this port"
            remedy = f"see {names.address} and {names.encryption}"
        elif _NO_COMMON_PROTOCOL.search(reason):
            message = f"no common TLS version or cipher ({words})"
            remedy = "enable TLS 1.2 or 1.3 at the broker"
        else:
            remedy = f"see {names.encryption} and {names.cafile}"
            return ConnectionProblem(f"TLS failed: {words or error}", remedy)
        return ConnectionProblem(message, remedy, permanent=True)


def warn_plaintext_password(hosts: Sequence[str], remedy: str) -> list[Finding]:
    """A warning if a password that is sent without TLS leaves this machine."""
    if all(host in {"localhost", "::1"} or host.startswith("127.") for host in hosts):
        return []
    return [Finding("warn", "the password is sent unencrypted", remedy)]


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _file_error(error: OSError, default: str) -> str:
    return default if isinstance(error, ssl.SSLError) else error.strerror or str(error)
