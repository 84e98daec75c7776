"""One connection to the broker, by aiomqtt with corrections.

aiomqtt treats a refused publish as delivered, does not wake tasks that wait for a response when the
connection is lost, drops messages that do not fit its queue after acknowledging them, and may leave
a socket open if connecting fails. This module reads the broker's responses, passes messages on
before they are acknowledged, without a queue, and always closes the socket. It is the only one that
uses private attributes of aiomqtt and paho.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import aiomqtt
from aiomqtt.exceptions import MqttCodeError
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from kronos_connectors._shared.client_errors import capture_paho_errors
from kronos_connectors.mqtt.errors import CONNECTION_CLOSED, explain
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.reason_codes import NO_RESPONSE, BrokerResponse

_T = TypeVar("_T")

_CLOSE_TIMEOUT_SECONDS = 1.0
_UNSPECIFIED_ERROR = 128
"""Reason code of paho for a disconnect without one."""

_LIVE_QOS1 = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)


class MqttConnectionError(Exception):
    """No connection, a lost connection, or no response.

    response: of the broker, NO_RESPONSE if there is none. permanent: retries fail until the
    configuration changes.
    """

    def __init__(
        self, reason: object, response: BrokerResponse = NO_RESPONSE, *, permanent: bool = False
    ) -> None:
        super().__init__(str(reason))
        self.response, self.permanent = response, permanent or response.permanent


class Connection(aiomqtt.Client):
    """A connection from :meth:`open` to :meth:`close`; it is opened once."""

    def __init__(
        self,
        options: MqttOptions,
        identifier: str,
        *,
        session_seconds: int = 0,
        will: aiomqtt.Will | None = None,
        on_message: Callable[[str, bytes], None] | None = None,
    ) -> None:
        """session_seconds: how long the broker keeps the session after a disconnect; 0: no session.

        will: published by the broker if the connection is lost. on_message: receives topic and
        payload of a message, which is acknowledged when it returns.
        """
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = session_seconds
        properties.MaximumPacketSize = options.max_record_bytes
        logger, self._captured = capture_paho_errors()
        super().__init__(
            options.host,
            options.port,
            username=options.username or None,
            password=options.password.get_secret_value() or None,
            logger=logger,
            identifier=identifier,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=will,
            timeout=options.connect_seconds,
            keepalive=options.keepalive,
            clean_start=not session_seconds,
            max_queued_incoming_messages=1,  # unused, see _on_message
            max_queued_outgoing_messages=options.inflight,
            max_inflight_messages=options.inflight,
            properties=properties,
            # Otherwise the last packet waits about 40 ms for the acknowledgement of the others.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._client.connect_timeout = options.connect_seconds
        self.lost: asyncio.Future[MqttConnectionError] = self._loop.create_future()
        """The reason, once the connection has ended. Use asyncio.wait: a cancelled await of the
        future would cancel it."""
        self.resumed = False
        """True if the broker still had our session."""
        self.max_inflight = options.inflight
        """Limit of unacknowledged publishes."""
        self.max_packet_size = options.max_record_bytes
        """Largest message that the broker accepts, bytes."""
        self.retain_available = True
        """True if the broker retains messages."""
        self._options, self._message_handler = options, on_message
        self._pending_acks: dict[int, asyncio.Future[BrokerResponse | None]] = {}
        self._connecting = self._socket_released = False
        self._disconnected.add_done_callback(self._on_ended)

    # -- from open to close ------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and log in, within ``connect_seconds``. Raises MqttConnectionError."""
        seconds = self.timeout
        try:
            # The files are read each time, since certificates may be renewed.
            if self._options.encrypted:
                self._client.tls_set_context(self._options.tls_files.create_context())
            await _wait_within(seconds, self.__aenter__())
        except TimeoutError:
            self._release_socket()
            raise MqttConnectionError(f"no answer in {seconds:g} s") from None
        # ValueError: an invalid host name. OSError: also an unusable certificate.
        except (aiomqtt.MqttError, OSError, ValueError) as error:
            self._release_socket()
            if found := explain(error, self._captured, self._options):
                raise MqttConnectionError(found, permanent=found.permanent) from None
            raise _to_connection_error(error) from None
        except BaseException:
            self._release_socket()
            raise

    def abort(self, reason: str) -> None:
        """Treat the connection as lost."""
        self._mark_lost(MqttConnectionError(reason))
        self._release_socket()

    async def close(self) -> None:
        """Disconnect within a second, and close the socket in any case.

        Messages that arrive meanwhile are not acknowledged, so the next session receives them.
        """
        self._message_handler = None
        self._client.manual_ack_set(on=True)
        if self._connected.done() and not self.lost.done():
            with suppress(aiomqtt.MqttError, TimeoutError):
                await _wait_within(_CLOSE_TIMEOUT_SECONDS, self.__aexit__(None, None, None))
        self.abort("closed")
        if self._misc_task is not None:
            await asyncio.wait((self._misc_task,), timeout=_CLOSE_TIMEOUT_SECONDS)

    # -- publish and subscribe ---------------------------------------------------------------

    def publish_nowait(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool,
        content_type: str = "text/plain",
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> asyncio.Future[BrokerResponse | None]:
        """Publish with QoS 1; the future is the response, None if the connection is lost.

        At most :attr:`max_inflight` responses may be pending.
        """
        response: asyncio.Future[BrokerResponse | None] = self._loop.create_future()
        if self.lost.done():
            response.set_result(None)
            return response
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = content_type
        if user_properties:
            properties.UserProperty = list(user_properties)
        info = self._client.publish(topic, payload, 1, retain, properties)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            self.abort(paho.error_string(info.rc))
            response.set_result(None)
        else:
            self._pending_acks[info.mid] = response
        return response

    async def subscribe_topics(self, topics: Sequence[str]) -> dict[str, str]:
        """Subscribe with QoS 1, without retained messages. Raises MqttConnectionError.

        Returns the refused topics with the reasons.
        """
        requested = [(topic, _LIVE_QOS1) for topic in topics]
        codes = await self._wait_for_response(self.subscribe(requested))
        return {
            topic: str(_to_response(code))
            for topic, code in zip(topics, codes, strict=False)
            if isinstance(code, ReasonCode) and code.is_failure
        }

    async def unsubscribe_topics(self, topics: Sequence[str]) -> None:
        """Unsubscribe. Raises MqttConnectionError."""
        await self._wait_for_response(self.unsubscribe(list(topics)))

    async def _wait_for_response(self, request: Awaitable[_T]) -> _T:
        """The response; raises MqttConnectionError as soon as the connection is lost."""
        task = asyncio.ensure_future(request)
        try:
            await asyncio.wait((task, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            error = self.lost.result()
            raise MqttConnectionError(error, error.response)
        except aiomqtt.MqttError as error:
            raise _to_connection_error(error) from None
        finally:
            task.cancel()

    # -- overridden methods of aiomqtt -------------------------------------------------------

    def _client_connect(self) -> None:
        """Connect, in a thread that continues after the caller is cancelled."""
        self._connecting = True
        try:
            super()._client_connect()
        finally:
            self._connecting = False
            if self._socket_released:
                with suppress(RuntimeError):  # the event loop is closed, too
                    self._loop.call_soon_threadsafe(self._client._sock_close)  # noqa: SLF001

    def _release_socket(self) -> None:
        """Close the socket, after callbacks that the event loop has scheduled for it."""
        self._socket_released = True
        if not self._connecting:
            self._loop.call_soon(self._client._sock_close)  # noqa: SLF001

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,  # noqa: ANN401
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self.resumed = flags.session_present
        self.max_inflight = min(
            self.max_inflight, getattr(properties, "ReceiveMaximum", self.max_inflight)
        )
        self.max_packet_size = min(
            self.max_packet_size, getattr(properties, "MaximumPacketSize", self.max_packet_size)
        )
        self.retain_available = bool(getattr(properties, "RetainAvailable", True))
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,  # noqa: ANN401
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttError(CONNECTION_CLOSED))
            return
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self,
        client: paho.Client,  # noqa: ARG002
        userdata: Any,  # noqa: ANN401, ARG002
        mid: int,
        reason_code: ReasonCode,
        properties: Properties,  # noqa: ARG002
    ) -> None:
        response = self._pending_acks.pop(mid, None)
        if response is not None and not response.done():
            response.set_result(_to_response(reason_code))

    def _on_message(
        self,
        client: paho.Client,  # noqa: ARG002
        userdata: Any,  # noqa: ANN401, ARG002
        message: paho.MQTTMessage,
    ) -> None:
        # paho acknowledges the message when this returns.
        if self._message_handler is not None:
            self._message_handler(message.topic, bytes(message.payload))

    def _on_ended(self, disconnected: asyncio.Future[None]) -> None:
        error = None if disconnected.cancelled() else disconnected.exception()
        self._mark_lost(
            MqttConnectionError("closed") if error is None else _to_connection_error(error)
        )

    def _mark_lost(self, error: MqttConnectionError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        pending, self._pending_acks = self._pending_acks, {}
        for response in pending.values():
            if not response.done():
                response.set_result(None)


async def _wait_within(seconds: float, work: Awaitable[object]) -> None:
    """Await a call of aiomqtt; raises TimeoutError.

    The call gets its own task: aiomqtt uses asyncio.wait_for, which in Python 3.11 loses a
    cancellation that coincides with the awaited result.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise TimeoutError
    task.result()


def _to_response(code: ReasonCode) -> BrokerResponse:
    return BrokerResponse(code.value, code.getName())


def _to_connection_error(error: BaseException) -> MqttConnectionError:
    if isinstance(error, MqttCodeError) and isinstance(error.rc, ReasonCode):
        unspecified = error.rc.value == _UNSPECIFIED_ERROR
        response = NO_RESPONSE if unspecified else _to_response(error.rc)
        return MqttConnectionError(response, response)
    return MqttConnectionError(str(error) or type(error).__name__)
