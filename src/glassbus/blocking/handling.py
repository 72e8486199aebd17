"""Errors that a program hands to the bus itself, by the names that its users know.

Each of these methods works before `start`, on any thread, with anything as an argument; it answers truthfully and
raises nothing but KeyboardInterrupt on the main thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from msgspec.structs import replace

from glassbus.blocking.attempt import from_keyboard, named
from glassbus.blocking.loop import LoopThread
from glassbus.blocking.manager import ErrorRecoveryManager
from glassbus.blocking.own import Connections, Queues, Requeue
from glassbus.blocking.reported import Reported, sealed
from glassbus.bus import MessageBus
from glassbus.classification import classify
from glassbus.classification.verdicts import CORRUPT
from glassbus.errors import (
    ErrorCategory,
    ErrorReport,
    ErrorSeverity,
    GlassbusError,
    QueueFull,
    shown,
    type_name,
)
from glassbus.facts import ErrorReported, Fact
from glassbus.message import Envelope, Message
from glassbus.policy.escalation import RANK
from glassbus.record.errorlog import ErrorLogger
from glassbus.record.fingerprint import FailureSites
from glassbus.record.plain import fingerprint_of, text

logger = logging.getLogger("glassbus")

#: From so many failures in a row on, a connection's next one is critical.
_CONNECTION_CRITICAL_AFTER = 5
_CONNECTIONS_MAX = 1000
_CONTEXT_MAX = 32
#: So many kinds of critical failures wait for the start to be escalated.
_ESCALATIONS_MAX = 1000
#: How long a caller waits for a message to be at rest, in seconds; then it is held in memory.
_KEEP_S = 15.0
_TEXT_CAP = 200
_SCALARS = (str, int, float, bool)
#: A report with one of these is of a damaged store.
_DAMAGED = frozenset({"glassbus.errors.StoreCorrupt", "apsw.CorruptError", "apsw.NotADBError"})
#: What a failing connection is, whatever it failed with; other categories than these become the first.
_OF_CONNECTIONS = (
    ErrorCategory.CONNECTION_ERROR,
    ErrorCategory.AUTHENTICATION_ERROR,
    ErrorCategory.CONFIGURATION_ERROR,
    ErrorCategory.RESOURCE_EXHAUSTION,
)


class Handling(ABC):
    """The part of `ProductionMessageBus` that handles errors it is given."""

    error_logger: ErrorLogger
    recovery_manager: ErrorRecoveryManager
    connections: dict[Any, Any]
    _core: MessageBus
    _loop: LoopThread
    _reported: Reported
    _storing: asyncio.Task[None] | None = None

    def __init__(self, sites: FailureSites) -> None:
        self._sites = sites
        self._ids = itertools.count(1)
        self._id_prefix = secrets.token_hex(4)
        self._failing: dict[str, int] = {}
        #: What is to be escalated as soon as the bus runs, by fingerprint.
        self._to_escalate: dict[str, ErrorReport] = {}
        #: Of the errors handled here: those recovered, those that left a message unhandled, and failures to handle one.
        self.errors_recovered = self.messages_failed = self.handling_failures = 0
        self._make_locks()

    def _make_locks(self) -> None:
        self._describing = threading.Lock()  # failure sites belong to one thread at a time
        self._stating = threading.RLock()  # an observer may report an error itself
        self._counting = threading.Lock()

    # What users call

    def _handle_message_processing_error(
        self, message: Any, error: Any, context: Mapping[str, Any] | None = None
    ) -> bool:
        """A handler failed on `message`. Whether the message is safe: given back, dead-lettered or scheduled.

        `context` may hold managers (see `ErrorRecoveryManager.attempt_recovery`). Without a `message_queue` there, a
        message whose `topic` is known is published again, once the bus runs. What nothing recovers is kept among the
        bus's own dead letters, in the subscription `reported`; until it runs, in memory.
        """
        return self._handle(error, "handler", None, context, {"message": message})

    def _handle_connection_error(
        self, connection_id: Any, error: Any, context: Mapping[str, Any] | None = None
    ) -> bool:
        """A connection failed. Whether it is connected again.

        Without a `connection_manager` in `context`, the object in `connections` is asked to `reconnect()`.
        """
        return self._handle(error, "endpoint", _connection_category, context, {"connection_id": connection_id})

    def _handle_queue_overflow(self, queue_name: Any, message: Any, context: Mapping[str, Any] | None = None) -> bool:
        """A queue has no room for `message`. Whether something made room, slowed publishers or saved the message.

        It is kept as above where nothing else did.
        """
        error = QueueFull(named(queue_name), 0, 0.0)
        return self._handle(error, "queue", None, context, {"queue_name": queue_name, "message": message})

    def _categorize_error(self, error: Any) -> ErrorCategory:
        """What kind of failure it is, the configuration's `rules` first."""
        return self._sites.classify(_exception(error))[0]

    def _assess_severity(self, error: Any, context: Mapping[str, Any] | None = None) -> ErrorSeverity:
        """How bad it is; a `severity` in `context` is believed."""
        said = _said(context, "severity")
        return said if said is not None else self._sites.classify(_exception(error))[1]

    def _assess_connection_severity(self, *about: Any) -> ErrorSeverity:
        """Of a connection's failure, given its id, the error, or both in either order.

        As bad as the error, at least high, and critical from the fifth in a row on that connection.
        """
        errors = [one for one in about if _is_exception(one)]
        ids = [named(one) for one in about if not _is_exception(one)]
        if any(self._failing.get(one, 0) + 1 >= _CONNECTION_CRITICAL_AFTER for one in ids):
            return ErrorSeverity.CRITICAL
        if errors and self._sites.classify(errors[0])[1] is ErrorSeverity.CRITICAL:
            return ErrorSeverity.CRITICAL
        return ErrorSeverity.HIGH

    def _is_unrecoverable_error(self, error: Any) -> bool:
        """Whether nothing but an emergency stop is left: the store is damaged. Takes an exception or a report.

        A handler's exception is never that, however bad it is.
        """
        if type(error) is ErrorReport:
            return error.component != "handler" and error.exception_type in _DAMAGED
        return _is_exception(error) and classify(error) == CORRUPT

    def _escalate_critical_error(self, report: Any) -> bool:
        """Tell people of `report` now, as an escalation. Whether that is under way.

        An unrecoverable one stops the bus too. The bus calls it for critical errors that are handed to it. While it
        does not run, the log is told at once (CRITICAL), and the escalation opens when it runs.
        """
        try:
            if type(report) is not ErrorReport:
                return False
            if self._core.running:
                self._core.escalations.escalate(report)
            elif not self._hold_escalation(report):
                return False
            report.escalated = True
            if self._is_unrecoverable_error(report):
                self._emergency_shutdown(f"{report.exception_type}: {report.message}")
        except BaseException as failed:  # noqa: BLE001 - handling an error never raises out of the bus
            return self._could_not_handle(failed)
        return True

    def _hold_escalation(self, report: ErrorReport) -> bool:
        """Tell the log, and keep it for the next start. Whether there is room."""
        fingerprint = text(report.fingerprint, 100) or fingerprint_of(report)
        with self._counting:
            told = fingerprint in self._to_escalate
            room = told or len(self._to_escalate) < _ESCALATIONS_MAX
            if room:
                self._to_escalate[fingerprint] = report
        if not told:
            what = f"{text(report.exception_type, 300)}: {text(report.message)}"
            logger.critical("the bus does not run, so that only the log is told now: %s", what)
        return room

    def _escalate_held(self) -> None:
        """The bus runs: open what waited for that. Any thread."""
        with self._counting:
            held, self._to_escalate = self._to_escalate, {}
        for report in held.values():
            self._core.escalations.escalate(report)

    @abstractmethod
    def _emergency_shutdown(self, reason: str = "asked for by the program") -> bool:
        """Stop at once and save what is held. Whether that has ended."""

    # How

    def _handle(self, error: Any, component: str, category: Any, given: Any, about: dict[str, Any]) -> bool:
        try:
            return self._recover(_exception(error), component, category, _mapping(given), about, given)
        except BaseException as failed:  # noqa: BLE001 - handling an error never raises out of the bus
            return self._could_not_handle(failed)

    def _recover(
        self,
        error: BaseException,
        component: str,
        category: Any,
        context: dict[str, Any],
        about: dict[str, Any],
        given: Any,
    ) -> bool:
        report = self._report(error, component, context, about)
        connection = named(about["connection_id"]) if component == "endpoint" else ""
        if category is not None:
            report.category = category(report.category)
        if component == "endpoint":
            report.severity = self._assess_connection_severity(connection, error)
        elif component == "handler":
            report.severity = self._assess_severity(error, context)
        managers = {**self._own_managers(about, context), **context, **about}
        recovered = self.recovery_manager.attempt_recovery(report, managers)
        if "serialized_data" in managers and isinstance(given, dict):
            given["serialized_data"] = managers["serialized_data"]
        if component == "endpoint":
            self._note_connection(connection, recovered)
        if report.severity is ErrorSeverity.CRITICAL:
            self._escalate_critical_error(report)
        kept = not recovered and about.get("message") is not None and self._keep(about["message"], report)
        self._record(report, recovered, "message" in about)
        return recovered or kept

    def _keep(self, message: Any, report: Any) -> bool:
        """Put `message` to rest with `report`. Whether it is at rest, or held in memory until it can be."""
        if type(report) is not ErrorReport:
            return False
        # A dead letter as bad as this is told to people.
        told = RANK[report.severity] >= RANK[self._core.escalations.config.minimum]
        envelope = sealed(message, replace(report, escalated=report.escalated or told))
        if len(envelope.body) > self._core.settings.payload_bytes_max:
            self._reported.refuse()
            return False
        if not self._at_rest(envelope):
            if not self._reported.hold(envelope):
                return False
            self._loop.post(self._store_held)
        report.escalated = report.escalated or told
        return True

    def _at_rest(self, envelope: Envelope) -> bool:
        """Whether the store has it now. Why not is stated where it failed."""
        if not self._core.running:
            return False
        try:
            self._loop.call(self._core.resting.keep, envelope, within_s=_KEEP_S)
        except (GlassbusError, TimeoutError):
            return False
        return True

    def _store_held(self) -> None:
        """On the loop."""
        if self._core.running and self._reported.waiting:
            self._storing = self._reported.begin(self._core)

    def _record(self, report: ErrorReport, recovered: bool, of_message: bool) -> None:
        """Count it, write its line, and state it."""
        with self._counting:
            self.errors_recovered += recovered
            self.messages_failed += of_message and not recovered
        self.error_logger.log_error(report)
        self._state(ErrorReported(at=report.timestamp, report=report))

    def _report(
        self, error: BaseException, component: str, context: dict[str, Any], about: dict[str, Any]
    ) -> ErrorReport:
        with self._describing:
            return self._sites.describe(
                error,
                error_id=f"{self._id_prefix}-{next(self._ids)}",
                at=time.time(),
                component=component,
                context=_shown(context, about),
                retry_count=_retry_count(context),
            )

    def _own_managers(self, about: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
        """What the bus itself can do, where the program brings no manager for it."""
        own: dict[str, Any] = {}
        if "connection_id" in about:
            connections = Connections(self.connections, self._core)
            if connections.knows(about["connection_id"]):
                own["connection_manager"] = connections
        if "queue_name" in about:
            own["queue_manager"] = Queues(self._core)
        topic = _topic(about.get("message"), context)
        if topic and self._core.running:
            own["message_queue"] = Requeue(topic, self._core, self._loop)
        return own

    def _note_connection(self, connection: str, recovered: bool) -> None:
        with self._counting:
            if recovered:
                self._failing.pop(connection, None)
                return
            if len(self._failing) >= _CONNECTIONS_MAX and connection not in self._failing:
                del self._failing[next(iter(self._failing))]
            self._failing[connection] = self._failing.get(connection, 0) + 1

    def _state(self, fact: Fact) -> None:
        self._tell(self._core.hub.state, fact)

    def _tell(self, tell: Callable[..., None], *about: Any) -> None:
        """Have observers told on the bus's loop; while that does not run, here."""
        if self._loop.alive:
            self._loop.post(tell, *about)
        else:
            with self._stating:
                tell(*about)

    def _could_not_handle(self, failed: BaseException) -> bool:
        """Handling an error failed itself: counted and told, and nothing is claimed."""
        if from_keyboard(failed):
            raise failed
        with self._counting:
            self.handling_failures += 1
        self._tell(self._core.hub.failed, self, "error handling", failed)
        return False


def _is_exception(value: Any) -> TypeGuard[BaseException]:
    """By its type: an object of a program's own may answer for its class itself."""
    return issubclass(type(value), BaseException)


def _exception(error: Any) -> BaseException:
    """`error`, or what stands for it where it is none: earlier programs pass texts too."""
    if _is_exception(error):
        return error
    return RuntimeError(error if type(error) is str else shown(error))


def _mapping(context: Any) -> dict[str, Any]:
    try:
        return dict(context) if isinstance(context, Mapping) else {}
    except Exception:  # noqa: BLE001 - a mapping of the program's own may raise anything: it says nothing then
        return {}


def _said(context: Any, name: str) -> ErrorSeverity | None:
    try:
        return ErrorSeverity(_mapping(context)[name])
    except (KeyError, ValueError):
        return None


def _retry_count(context: dict[str, Any]) -> int:
    count = context.get("retry_count", 0)
    return count if type(count) is int and count >= 0 else 0


def _topic(message: Any, context: dict[str, Any]) -> str:
    topic = message.topic if type(message) is Message else context.get("topic")
    return topic if type(topic) is str else ""


def _connection_category(category: ErrorCategory) -> ErrorCategory:
    return category if category in _OF_CONNECTIONS else ErrorCategory.CONNECTION_ERROR


def _shown(context: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """What a report may say: plain values of the context, and what it is about by name; never a payload."""
    said: dict[str, Any] = {}
    for name, value in itertools.islice(context.items(), _CONTEXT_MAX):
        if type(name) is str and type(value) in _SCALARS and name not in ("message", "data", "payload"):
            said[name[:_TEXT_CAP]] = value[:_TEXT_CAP] if type(value) is str else value
    for name in ("connection_id", "queue_name"):
        if name in about:
            said[name] = named(about[name])
    message = about.get("message")
    if type(message) is Message:
        said["message_id"], said["topic"] = message.id, message.topic
    elif "message" in about:
        said["message_type"] = type_name(type(message))
    return said
