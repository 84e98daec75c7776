"""One connection to the broker: aiomqtt, and what it leaves out.

aiomqtt takes a refused publish for a delivered one, has those who wait for an answer go on waiting
when the connection is lost, drops messages that do not fit its queue after it has acknowledged
them, and may leave a socket behind where connecting fails. So what the broker answers is heard
here, messages are taken in before they are acknowledged, without a queue, and a socket is let go
whatever happens. Hence the look inside: this module alone knows aiomqtt and paho from within.
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

from kronos_connectors.mqtt.client_errors import CONNECTION_CLOSED, PahoErrorCapture
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.reason_codes import NO_RESPONSE, BrokerResponse

_T = TypeVar("_T")

_CLOSE_TIMEOUT_SECONDS = 1.0
_UNSPECIFIED_ERROR = 128
"""What paho calls an end without a word."""

_LIVE_QOS1 = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)


class MqttConnectionError(Exception):
    """There is no connection, or no more, or no answer; one clause for people.

    answer: what the broker said, SILENCE if nothing. refused: whether it is the same next time,
    unless somebody changes something.
    """

    def __init__(
        self, reason: object, response: BrokerResponse = NO_RESPONSE, *, permanent: bool = False
    ) -> None:
        super().__init__(str(reason))
        self.response, self.permanent = response, permanent or response.permanent


class Connection(aiomqtt.Client):
    """From :meth:`open` to :meth:`close`; opened once."""

    def __init__(
        self,
        options: MqttOptions,
        identifier: str,
        *,
        session_seconds: int = 0,
        will: aiomqtt.Will | None = None,
        on_message: Callable[[str, bytes], None] | None = None,
    ) -> None:
        """session_seconds: how long the broker keeps the session once we are gone; 0 begins anew.

        will: what the broker publishes when we are gone without a word. take: told topic and
        payload of what arrives, which counts as delivered when it returns.
        """
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = session_seconds
        properties.MaximumPacketSize = options.max_record_bytes
        self._error_capture = PahoErrorCapture()
        super().__init__(
            options.host,
            options.port,
            username=options.username or None,
            password=options.password.get_secret_value() or None,
            logger=self._error_capture.logger,
            identifier=identifier,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=will,
            timeout=options.connect_seconds,
            keepalive=options.keepalive,
            clean_start=not session_seconds,
            max_queued_incoming_messages=1,  # not used, see _on_message
            max_queued_outgoing_messages=options.inflight,
            max_inflight_messages=options.inflight,
            properties=properties,
            # Or the last of what is sent waits, some 40 ms, for the broker to acknowledge the rest.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._client.connect_timeout = options.connect_seconds
        self.lost: asyncio.Future[MqttConnectionError] = self._loop.create_future()
        """Done once the connection has ended: why. Not to be awaited, but waited for: whoever is
        cancelled while awaiting it would cancel it."""
        self.resumed = False
        """Whether the broker still had our session."""
        self.max_inflight = options.inflight
        """How many publishes may be unanswered."""
        self.max_packet_size = options.max_record_bytes
        """The largest message that the broker takes."""
        self.retain_available = True
        """Whether the broker retains messages."""
        self._options, self._message_handler = options, on_message
        self._pending_acks: dict[int, asyncio.Future[BrokerResponse | None]] = {}
        self._connecting = self._socket_released = False
        self._disconnected.add_done_callback(self._on_ended)

    # -- from open to close ------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and log in. Raises LinkError; bounded by ``connect_seconds``."""
        seconds = self.timeout
        try:
            # Read each time: certificates are renewed while a daemon runs.
            if (context := self._options.ssl_context()) is not None:
                self._client.tls_set_context(context)
            await _wait_within(seconds, self.__aenter__())
        except TimeoutError:
            self._release_socket()
            raise MqttConnectionError(f"no answer in {seconds:g} s") from None
        # Also a name that no host can have, or a lost certificate.
        except (aiomqtt.MqttError, OSError, ValueError) as error:
            self._release_socket()
            if found := self._error_capture.explain(error, self._options):
                raise MqttConnectionError(found, permanent=found.permanent) from None
            raise _to_connection_error(error) from None
        except BaseException:
            self._release_socket()
            raise

    def abort(self, reason: str) -> None:
        """Count it as lost."""
        self._mark_lost(MqttConnectionError(reason))
        self._release_socket()

    async def close(self) -> None:
        """Say goodbye if anyone hears it, within a second; the socket is let go in any case.

        What still arrives meanwhile is not acknowledged, and so comes again in the next session.
        """
        self._message_handler = None
        self._client.manual_ack_set(on=True)
        if self._connected.done() and not self.lost.done():
            with suppress(aiomqtt.MqttError, TimeoutError):
                await _wait_within(_CLOSE_TIMEOUT_SECONDS, self.__aexit__(None, None, None))
        self.abort("closed")
        if self._misc_task is not None:
            await asyncio.wait((self._misc_task,), timeout=_CLOSE_TIMEOUT_SECONDS)

    # -- what goes through it ----------------------------------------------------------------

    def publish_nowait(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool,
        content_type: str = "text/plain",
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> asyncio.Future[BrokerResponse | None]:
        """Publish at once, QoS 1: the future is the broker's answer, None once the link is lost.

        No more than :attr:`window` may wait for one. attributes: user properties.
        """
        answer: asyncio.Future[BrokerResponse | None] = self._loop.create_future()
        if self.lost.done():
            answer.set_result(None)
            return answer
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = content_type
        if user_properties:
            properties.UserProperty = list(user_properties)
        info = self._client.publish(topic, payload, 1, retain, properties)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            self.abort(paho.error_string(info.rc))
            answer.set_result(None)
        else:
            self._pending_acks[info.mid] = answer
        return answer

    async def subscribe_topics(self, topics: Sequence[str]) -> dict[str, str]:
        """Subscribe, QoS 1, without what is retained: why which are refused. Raises LinkError."""
        asked = [(topic, _LIVE_QOS1) for topic in topics]
        codes = await self._wait_for_response(self.subscribe(asked))
        return {
            topic: str(_to_response(code))
            for topic, code in zip(topics, codes, strict=False)
            if isinstance(code, ReasonCode) and code.is_failure
        }

    async def unsubscribe_topics(self, topics: Sequence[str]) -> None:
        """Unsubscribe. Raises LinkError."""
        await self._wait_for_response(self.unsubscribe(list(topics)))

    async def _wait_for_response(self, request: Awaitable[_T]) -> _T:
        """The answer, or LinkError as soon as the link is lost."""
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

    # -- what aiomqtt does otherwise ---------------------------------------------------------

    def _client_connect(self) -> None:
        """Runs in a thread, which goes on where whoever waited for it does not."""
        self._connecting = True
        try:
            super()._client_connect()
        finally:
            self._connecting = False
            if self._socket_released:
                with suppress(RuntimeError):  # nor is there a loop any more
                    self._loop.call_soon_threadsafe(self._client._sock_close)  # noqa: SLF001

    def _release_socket(self) -> None:
        """Let go of the socket, behind whatever the loop was asked to do with it."""
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
        answer = self._pending_acks.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(_to_response(reason_code))

    def _on_message(
        self,
        client: paho.Client,  # noqa: ARG002
        userdata: Any,  # noqa: ANN401, ARG002
        message: paho.MQTTMessage,
    ) -> None:
        # paho acknowledges once this returns.
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
        answers, self._pending_acks = self._pending_acks, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_result(None)


async def _wait_within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for what aiomqtt does, or TimeoutError.

    It has a task of its own: aiomqtt waits by asyncio.wait_for, which up to Python 3.11 forgets
    that it was cancelled if at the same moment what it waits for happens.
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
        answer = NO_RESPONSE if error.rc.value == _UNSPECIFIED_ERROR else _to_response(error.rc)
        return MqttConnectionError(answer, answer)
    return MqttConnectionError(str(error) or type(error).__name__)
