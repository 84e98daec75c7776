"""What keeps us from the brokers, in words: why, and what to do about it."""

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

from kronos_connectors._shared import tls
from kronos_connectors._shared.client_errors import ErrorCapture
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.kafka.options import SETTING_NAMES, KafkaOptions

_PREFIX = "KRONOS_STREAM_KAFKA__"
_LOGIN_REMEDY = f"see {_PREFIX}SASL_USERNAME, {_PREFIX}SASL_PASSWORD and {_PREFIX}SASL_MECHANISM"
_TLS_ALERT = 0x1503
"""How an alert of TLS begins; to Kafka it is half the length of an answer."""
_DENIED = (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
)
_UNREACHABLE: dict[type[Exception], str] = {
    ConnectionRefusedError: "nobody listens there (connection refused)",
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
    """Why ``error``, which a client of aiokafka raised.

    chatter: what it has said meanwhile. silence: what it means that time was up.
    """
    told = explain_captured(captured, options)
    # Where no broker can be had it raises no more than that, or waits until time is up.
    if told is not None and (told.permanent or isinstance(error, KafkaConnectionError)):
        return told
    if isinstance(error, TimeoutError) and timeout_message:
        return (
            told._replace(message=f"{timeout_message} ({told.message})")
            if told
            else ConnectionProblem(timeout_message, "")
        )
    return _explain_error(error, options)


def explain_captured(captured: ErrorCapture, options: KafkaOptions) -> ConnectionProblem | None:
    """What was said of brokers: that one refuses us before all else, or what was said last."""
    faults = []
    for where, error in captured.errors.items():
        told = _explain_error(error, options)
        # A login is not one broker's business; nor is it to be told of each in turn.
        place = options.bootstrap_servers if _explain_login(error, options) else where
        faults.append(told._replace(message=f"{place}: {told.message}") if place else told)
    return next((one for one in faults if one.permanent), faults[-1] if faults else None)


def _explain_error(error: BaseException, options: KafkaOptions) -> ConnectionProblem:
    """What ``error`` means by itself."""
    return (
        tls.explain(error, SETTING_NAMES, options.ssl_cafile, options.ssl_certfile)
        or _explain_login(error, options)
        or _explain_connection(error, options)
        or ConnectionProblem(str(error) or type(error).__name__, "")
    )


def _explain_login(error: BaseException, options: KafkaOptions) -> ConnectionProblem | None:
    if isinstance(error, SaslAuthenticationFailed):
        told = ", ".join(map(str, error.args))
        return ConnectionProblem(
            f"login as {options.sasl_username} refused ({told})", _LOGIN_REMEDY, permanent=True
        )
    if isinstance(error, UnsupportedSaslMechanismError):
        what = f"no login by {options.sasl_mechanism} there"
        return ConnectionProblem(what, f"see {_PREFIX}SASL_MECHANISM", permanent=True)
    if isinstance(error, IllegalSaslStateError):
        return ConnectionProblem(
            "it takes no login there", f"see {_PREFIX}SECURITY_PROTOCOL", permanent=True
        )
    if isinstance(error, _DENIED):
        kind = type(error).__name__.partition("Auth")[0].lower()
        what = f"no right to the {kind} {', '.join(map(str, error.args))}".rstrip()
        if isinstance(error, ClusterAuthorizationFailedError):  # what idempotence asks for
            what = "no right to write to any topic"
        return ConnectionProblem(what, "let an administrator allow it, by kafka-acls.sh")
    return None


def _explain_connection(error: BaseException, options: KafkaOptions) -> ConnectionProblem | None:
    cause, security = error.__cause__ or error, f"see {_PREFIX}SECURITY_PROTOCOL"
    if isinstance(cause, asyncio.IncompleteReadError) and (cause.expected or 0) >> 16 == _TLS_ALERT:
        return ConnectionProblem("it speaks TLS there", security, permanent=True)
    if isinstance(cause, (asyncio.IncompleteReadError, ConnectionResetError)):
        what = f"it hung up at once, as if {options.security_protocol} were not what it speaks"
        return ConnectionProblem(what, security)
    if isinstance(error, InconsistentGroupProtocolError):
        what = "others of the consumer group share out in another way, so they are none of ours"
        return ConnectionProblem(what, f"set {_PREFIX}GROUP to a name that nobody else uses")
    if isinstance(error, UnsupportedCodecError):
        return ConnectionProblem(str(error), "to have them all: pip install 'aiokafka[all]'")
    for kind, what in _UNREACHABLE.items():
        if isinstance(error, kind):
            return ConnectionProblem(what, f"see {_PREFIX}BOOTSTRAP_SERVERS")
    return None
