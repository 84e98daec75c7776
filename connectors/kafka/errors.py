"""Explanations of failures of aiokafka's clients, with remedies."""

from __future__ import annotations

import asyncio
import socket

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    InconsistentGroupProtocolError,
    KafkaConnectionError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
    UnsupportedSaslMechanismError,
)

from kronos_connectors._shared.client_errors import ErrorCapture
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.kafka.options import KafkaOptions

_PREFIX = "KRONOS_STREAM_KAFKA__"
ADDRESS_REMEDY = f"see {_PREFIX}BOOTSTRAP_SERVERS"
_LOGIN_REMEDY = f"see {_PREFIX}SASL_USERNAME, {_PREFIX}SASL_PASSWORD and {_PREFIX}SASL_MECHANISM"
_TLS_ALERT = 0x1503
"""First two bytes of a TLS alert, which Kafka takes for the upper half of a length."""
_DENIED = (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
)
_UNREACHABLE: dict[type[Exception], str] = {
    ConnectionRefusedError: "connection refused",
    socket.gaierror: "no such host",
    TimeoutError: "no answer",
}


def explain(
    error: BaseException,
    captured: ErrorCapture,
    options: KafkaOptions,
    *,
    timeout_message: str = "",
) -> ConnectionProblem:
    """Explain an error of a client of aiokafka by the errors that it has logged meanwhile.

    timeout_message: explains a TimeoutError.
    """
    found = explain_captured(captured, options)
    # Without a broker, aiokafka raises only a connection error, or waits until the time-out.
    if found is not None and (found.permanent or isinstance(error, KafkaConnectionError)):
        return found
    if isinstance(error, TimeoutError) and timeout_message:
        if found is None:
            return ConnectionProblem(timeout_message, "")
        return found._replace(message=f"{timeout_message} ({found.message})")
    return _explain_error(error, options)


def explain_captured(captured: ErrorCapture, options: KafkaOptions) -> ConnectionProblem | None:
    """The first permanent problem of a broker, otherwise the newest problem."""
    problems = []
    for broker, error in captured.errors.items():
        found = _explain_error(error, options)
        # All brokers share one login: report it once.
        place = options.bootstrap_servers if _explain_login(error, options) else broker
        problems.append(found._replace(message=f"{place}: {found.message}") if place else found)
    return next((one for one in problems if one.permanent), problems[-1] if problems else None)


def _explain_error(error: BaseException, options: KafkaOptions) -> ConnectionProblem:
    return (
        options.tls_files.explain(error)
        or _explain_login(error, options)
        or _explain_connection(error, options)
        or ConnectionProblem(str(error) or type(error).__name__, "")
    )


def _explain_login(error: BaseException, options: KafkaOptions) -> ConnectionProblem | None:
    if isinstance(error, SaslAuthenticationFailed):
        detail = ", ".join(map(str, error.args))
        message = f"login as {options.sasl_username} refused ({detail})"
        return ConnectionProblem(message, _LOGIN_REMEDY, permanent=True)
    if isinstance(error, UnsupportedSaslMechanismError):
        message = f"the broker does not support login by {options.sasl_mechanism} on this port"
        return ConnectionProblem(message, f"see {_PREFIX}SASL_MECHANISM", permanent=True)
    if isinstance(error, IllegalSaslStateError):
        message = "the broker does not support logins on this port"
        return ConnectionProblem(message, f"see {_PREFIX}SECURITY_PROTOCOL", permanent=True)
    if isinstance(error, _DENIED):
        kind = type(error).__name__.partition("Auth")[0].lower()
        message = f"no right to the {kind} {', '.join(map(str, error.args))}".rstrip()
        if isinstance(error, ClusterAuthorizationFailedError):  # required for idempotence
            message = "no right to write to any topic"
        return ConnectionProblem(message, "an administrator can grant it by kafka-acls.sh")
    return None


def _explain_connection(error: BaseException, options: KafkaOptions) -> ConnectionProblem | None:
    cause, remedy = error.__cause__ or error, f"see {_PREFIX}SECURITY_PROTOCOL"
    if isinstance(cause, asyncio.IncompleteReadError) and (cause.expected or 0) >> 16 == _TLS_ALERT:
        return ConnectionProblem("the broker requires TLS on this port", remedy, permanent=True)
    if isinstance(cause, (asyncio.IncompleteReadError, ConnectionResetError)):
        protocol = options.security_protocol
        message = f"the broker closed the connection at once, maybe it does not expect {protocol}"
        return ConnectionProblem(message, remedy)
    if isinstance(error, InconsistentGroupProtocolError):
        message = "other members of the consumer group are no kronos-stream daemons of this role"
        return ConnectionProblem(message, f"set {_PREFIX}GROUP to an unused name")
    if isinstance(error, UnsupportedCodecError):
        return ConnectionProblem(str(error), "to support all: pip install 'aiokafka[all]'")
    for kind, message in _UNREACHABLE.items():
        if isinstance(error, kind):
            return ConnectionProblem(message, ADDRESS_REMEDY)
    return None
