"""ErrorRecoveryManager: recovers a reported error with the managers that a program has."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from glassbus.blocking.attempt import Attempt, Outcome, category_of, described, dropped, from_keyboard, named
from glassbus.blocking.breaker import CircuitBreaker
from glassbus.blocking.strategies import BUILT_IN, Strategy, dead_letter
from glassbus.blocking.timer import Timer
from glassbus.errors import BreakerOpen, ConfigurationError, ErrorCategory, ErrorReport, shown
from glassbus.facts import BreakerStateChanged, Fact, RecoveryConcluded, RecoveryStarted
from glassbus.policy.breaker import Transition

logger = logging.getLogger("glassbus")

_C = ErrorCategory
_DELAY_MAX_S = 30.0

#: Retries after the first failure, and seconds before the second retry (the first is at once; later ones double).
DEFAULT_RETRIES: dict[ErrorCategory, tuple[int, float]] = {
    _C.CONNECTION_ERROR: (3, 2.0),
    _C.MESSAGE_PROCESSING_ERROR: (2, 1.0),
    _C.SERIALIZATION_ERROR: (1, 0.5),
    _C.QUEUE_OVERFLOW: (3, 1.0),
    _C.TIMEOUT_ERROR: (2, 1.5),
    _C.AUTHENTICATION_ERROR: (1, 1.0),
    _C.RESOURCE_EXHAUSTION: (2, 2.0),
    _C.CONFIGURATION_ERROR: (1, 1.0),
}
_COMPONENTS: dict[ErrorCategory, Literal["endpoint", "queue", "resources", "configuration"]] = {
    _C.CONNECTION_ERROR: "endpoint",
    _C.AUTHENTICATION_ERROR: "endpoint",
    _C.QUEUE_OVERFLOW: "queue",
    _C.RESOURCE_EXHAUSTION: "resources",
    _C.CONFIGURATION_ERROR: "configuration",
}


class _NotRecovered(Exception):
    """Carries the outcome of a failed attempt through the breaker, which counts it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


class ErrorRecoveryManager:
    """Recovers errors by category, each through a breaker. Any thread may use it.

    `config` may hold `retry_configs` (category -> {"max_retries", "backoff_factor"}) and `circuit_breaker`
    ({"failure_threshold", "recovery_timeout"}); what else it holds is ignored. `recovery_strategies` (category ->
    callable of report and context), `retry_configs` and `circuit_breakers` are dicts of the program's, to be changed at
    will.

    The managers that `attempt_recovery` finds in its context are called in the caller's thread, and a
    manager that hangs holds its caller up; only delayed retries run on threads of their own.

    `unsaved` counts messages whose delayed retry failed and that no dead-letter queue took then: each is also told in
    the log, as an ERROR, and its report says that it was not recovered. `keep` (message, report), if given, is
    asked to take such a message first, and answers whether it did.

    Raises ConfigurationError for settings that cannot work.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        state: Callable[[Fact], None] | None = None,
        keep: Callable[[Any, Any], bool] | None = None,
    ) -> None:
        self.config: Mapping[str, Any] = {} if config is None else config
        given = self.config if isinstance(self.config, Mapping) else {}
        self.retry_configs: dict[ErrorCategory, dict[str, float]] = _retry_configs(given.get("retry_configs"))
        self.unsaved = 0
        self._state = state
        self._keep = keep
        self.circuit_breakers: dict[ErrorCategory, CircuitBreaker] = {
            category: self._breaker(category, given.get("circuit_breaker")) for category in ErrorCategory
        }
        self.recovery_strategies: dict[ErrorCategory, Callable[[Any, Any], Any]] = {
            category: Strategy(recover, self) for category, recover in BUILT_IN.items()
        }
        self._timer = Timer("recovery")
        self._lock = threading.Lock()
        self._reconnecting: set[str] = set()

    def attempt_recovery(self, report: ErrorReport, context: Mapping[str, Any] | None = None) -> bool:
        """Try to recover `report` now, with the managers in `context`. Whether that worked; never None.

        True means done, dead-lettered, or scheduled on the timer with a dead-letter queue to catch what fails
        there. It sleeps in nobody's thread. The report is marked: `recovery_attempted`, `recovery_successful`,
        and `retry_count`, which also limits the tries. An attempt that fails or raises counts against the
        breaker of its category; while that is open nothing is tried, and a message is dead-lettered at once where
        there is a queue for it. Raises nothing but KeyboardInterrupt.

        Managers, by their name in `context`, and what is asked of them:

        - `connection_manager.reconnect(connection_id)`: must answer something true
        - `message_queue.requeue_message(message)`
        - `dead_letter_queue.add_message(message, report)`
        - `serializer.fallback_serialize(data)`: its answer is put into the context as `serialized_data`
        - `queue_manager.apply_backpressure(queue_name)`, `can_expand_capacity(queue_name)` (must answer something
          true), `expand_capacity(queue_name, factor)`
        - `timeout_manager.increase_timeout(operation, factor)`
        - `credential_manager.refresh_credentials(connection_id)`
        - `resource_manager.reduce_load(factor)`
        - `configuration_manager.reload()`, `restore_last_known_good()`

        The others have done it when they raise nothing and do not answer False. What they are asked about stands in
        the context, or in the report's, as `connection_id`, `message`, `data`, `queue_name`, `operation`.
        """
        attempt = Attempt(report, context)
        started = time.monotonic()
        attempt.mark(recovery_attempted=True, recovery_successful=False)
        outcome = self._guarded(attempt, started)
        attempt.mark(recovery_successful=outcome.ok)
        if not outcome.told:
            self._conclude(attempt, outcome, started)
        return outcome.ok

    def breaker_views(self) -> list[CircuitBreaker]:
        """Its breakers as a bus shows them; what a program put in their place is its own to show."""
        return [one for one in list(self.circuit_breakers.values()) if isinstance(one, CircuitBreaker)]

    def close(self, deadline_s: float = 5.0) -> bool:
        """Run at once what was to be tried later, and take no more of it. Whether all ended in time."""
        return self._timer.close(deadline_s)

    # One attempt

    def _guarded(self, attempt: Attempt, started: float) -> Outcome:
        """One try, through the breaker of its category."""
        breaker = self.circuit_breakers.get(attempt.category)
        try:
            if breaker is None:
                return self._try(attempt)
            answer = breaker.call(self._try, attempt)
        except _NotRecovered as failed:
            return failed.outcome
        except BreakerOpen as refused:
            if attempt.begun:  # another breaker, within the strategy
                return Outcome(False, "custom", described(refused))
            self._conclude(attempt, Outcome(False, self._action(attempt), described(refused)), started, refused=True)
            return dead_letter(attempt, described(refused))._replace(told=True)
        except BaseException as error:  # a strategy, or a breaker of the program's, may raise anything
            if from_keyboard(error):
                raise
            return Outcome(False, "custom", described(error))
        return answer if isinstance(answer, Outcome) else Outcome(False, "custom", "the breaker did not make the call")

    def _try(self, attempt: Attempt) -> Outcome:
        """What the strategy makes of it. Raises _NotRecovered."""
        attempt.begun = True
        strategy = self.recovery_strategies.get(attempt.category)
        self._begin(attempt)
        if isinstance(strategy, Strategy):
            outcome = strategy.run(attempt)
        elif strategy is None:
            outcome = Outcome(False, "none", f"there is no strategy for {attempt.category.value}")
        else:
            outcome = _custom(strategy(attempt.report, attempt.context))
        if not outcome.ok:
            raise _NotRecovered(outcome)
        return outcome

    # What strategies may have done later

    def retries(self, category: ErrorCategory, /) -> int:
        """How many retries the settings allow now."""
        return int(self._setting(category)[0])

    def backoff_s(self, category: ErrorCategory, retry: int, /) -> float:
        """Seconds before retry number `retry`, counted from 0: none before the first, then doubling, with jitter."""
        if retry < 1:
            return 0.0
        most = min(_DELAY_MAX_S, self._setting(category)[1] * 2.0 ** min(retry - 1, 32))
        return most * random.uniform(0.5, 1.0)  # noqa: S311 - chance for jitter, not for secrets

    def requeue(self, attempt: Attempt, message: Any, delay_s: float, /) -> bool:
        """Give `message` back to its queue in `delay_s` seconds; dead-letter it when that fails."""
        started = time.monotonic()

        def give_back() -> None:
            answer = attempt.ask("message_queue", "requeue_message", message)
            if answer.done:
                outcome = Outcome(True, "delayed_retry")
            else:
                outcome = dead_letter(attempt, answer.error or "the queue did not take it back")
            if not outcome.ok:
                self._unsaved(attempt, message, answer.error, outcome.error)
            self._ended_later(attempt, outcome, started)

        return self._timer.schedule(delay_s, give_back)

    def _unsaved(self, attempt: Attempt, message: Any, *why: str) -> None:
        """What was promised to the caller did not come true: somebody must be told."""
        if self._keep is not None:
            try:
                if self._keep(message, attempt.report):
                    return
            except Exception as error:  # noqa: BLE001 - whatever it is made of, it has not taken the message
                why = (*why, described(error))
        with self._lock:
            self.unsaved += 1
        logger.error(
            "a message could neither be tried again nor dead-lettered, and is lost unless the program has it (%s): %s",
            _error(attempt),
            "; ".join(dict.fromkeys(one for one in why if one)),
        )

    def reconnect(self, attempt: Attempt, connection_id: Any, /) -> None:
        """Try again after a while, until it works or the retries are spent; once at a time for one connection."""
        key = named(connection_id)
        with self._lock:
            if key in self._reconnecting:
                return
            self._reconnecting.add(key)
        self._reconnect_later(attempt, connection_id, key, time.monotonic())

    def _reconnect_later(self, attempt: Attempt, connection_id: Any, key: str, started: float) -> None:
        def again() -> None:
            answer = attempt.ask("connection_manager", "reconnect", connection_id)
            attempt.mark(retry_count=attempt.retry_count + 1)
            error = answer.error or ("" if answer.yes else f"{key} could not be reconnected")
            self._ended_later(attempt, Outcome(answer.yes, "reconnect", error), started)
            if answer.yes or attempt.retry_count >= self.retries(attempt.category):
                self._given_up(key)
            else:
                self._reconnect_later(attempt, connection_id, key, started)

        if not self._timer.schedule(self.backoff_s(attempt.category, attempt.retry_count), again):
            self._given_up(key)

    def _given_up(self, key: str) -> None:
        with self._lock:
            self._reconnecting.discard(key)

    def _ended_later(self, attempt: Attempt, outcome: Outcome, started: float) -> None:
        """What the timer tried has ended; its failure counts, as it would have in the caller."""
        attempt.mark(recovery_successful=outcome.ok)
        breaker = self.circuit_breakers.get(attempt.category)
        if breaker is not None:
            with contextlib.suppress(Exception):  # _NotRecovered, which is what it is to count, or its refusal
                breaker.call(_as_told, outcome)
        self._conclude(attempt, outcome, started)

    # Settings and facts

    def _setting(self, category: ErrorCategory) -> tuple[float, float]:
        """Retries and backoff as the program has them now; the defaults where what it has is no number."""
        retries, backoff_s = DEFAULT_RETRIES[category]
        with contextlib.suppress(Exception):  # the program may have put anything there
            given = self.retry_configs[category]
            retries = max(0, int(given.get("max_retries", retries)))
            backoff_s = min(_DELAY_MAX_S, max(0.0, float(given.get("backoff_factor", backoff_s))))
        return retries, backoff_s

    def _breaker(self, category: ErrorCategory, given: Any) -> CircuitBreaker:
        options = given if isinstance(given, Mapping) else {}
        return CircuitBreaker(
            options.get("failure_threshold", 5),
            options.get("recovery_timeout", 60.0),
            name=f"recovery/{category.value}",
            on_transition=lambda moved: self._moved(f"recovery/{category.value}", moved),
        )

    def _moved(self, breaker: str, moved: Transition[str]) -> None:
        if self._state is not None:
            self._state(
                BreakerStateChanged(
                    at=time.time(),
                    breaker=breaker,
                    kind="component",
                    subscription="",
                    from_state=moved.from_state.value,
                    to_state=moved.to_state.value,
                    reason=moved.reason,
                )
            )

    def _action(self, attempt: Attempt) -> str:
        return _FIRST_ACTIONS[attempt.category]

    def _begin(self, attempt: Attempt) -> None:
        if self._state is not None:
            self._state(
                RecoveryStarted(
                    at=time.time(),
                    component=_COMPONENTS.get(attempt.category, "handler"),
                    category=attempt.category,
                    action=self._action(attempt),
                    target=_target(attempt),
                    attempt=attempt.retry_count + 1,
                    error=_error(attempt),
                )
            )

    def _conclude(self, attempt: Attempt, outcome: Outcome, started: float, *, refused: bool = False) -> None:
        if self._state is not None:
            self._state(
                RecoveryConcluded(
                    at=time.time(),
                    component=_COMPONENTS.get(attempt.category, "handler"),
                    category=attempt.category,
                    action=outcome.action,
                    target=_target(attempt),
                    attempt=max(1, attempt.retry_count),
                    outcome="refused" if refused else "succeeded" if outcome.ok else "failed",
                    duration_s=time.monotonic() - started,
                    error=outcome.error,
                    reported=True,
                )
            )


_FIRST_ACTIONS: dict[ErrorCategory, str] = {
    _C.CONNECTION_ERROR: "reconnect",
    _C.MESSAGE_PROCESSING_ERROR: "immediate_retry",
    _C.SERIALIZATION_ERROR: "fallback_codec",
    _C.QUEUE_OVERFLOW: "backpressure",
    _C.TIMEOUT_ERROR: "increase_timeout",
    _C.AUTHENTICATION_ERROR: "refresh_credentials",
    _C.RESOURCE_EXHAUSTION: "shed",
    _C.CONFIGURATION_ERROR: "reload",
}


def _as_told(outcome: Outcome) -> None:
    """For the breaker: as the outcome says. Raises _NotRecovered."""
    if not outcome.ok:
        raise _NotRecovered(outcome)


def _custom(answer: Any) -> Outcome:
    """What a strategy of the program's own said: nothing is no success, and a coroutine has done nothing."""
    if dropped(answer):
        return Outcome(False, "custom", "the strategy is async and was not run: give a plain function")
    return Outcome(answer is not None and bool(answer), "custom", "" if answer else "the strategy did not recover it")


def _target(attempt: Attempt) -> str:
    return named(attempt.find("connection_id", "queue_name", "operation", "message_id"))


def _error(attempt: Attempt) -> str:
    report = attempt.report
    return f"{report.exception_type}: {report.message}"[:300] if isinstance(report, ErrorReport) else shown(report)


def _retry_configs(given: Any) -> dict[ErrorCategory, dict[str, float]]:
    """The defaults, changed by what is given. Raises ConfigurationError."""
    configs: dict[ErrorCategory, dict[str, float]] = {
        category: {"max_retries": retries, "backoff_factor": backoff_s}
        for category, (retries, backoff_s) in DEFAULT_RETRIES.items()
    }
    if given is None:
        return configs
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"retry_configs is a dict by category, not {shown(given)}")
    for name, settings in given.items():
        category = category_of(name)
        if category.value != str(getattr(name, "value", name)).lower():
            raise ConfigurationError(
                f"retry_configs has no category {shown(name)}; they are {', '.join(ErrorCategory)}"
            )
        if not isinstance(settings, Mapping):
            raise ConfigurationError(f"retry_configs[{category.value!r}] is a dict, not {shown(settings)}")
        for key in ("max_retries", "backoff_factor"):
            value = settings.get(key, configs[category][key])
            if type(value) not in (int, float) or not 0 <= value <= 1e6:
                raise ConfigurationError(f"{key} of {category.value} must be 0 or more, not {shown(value)}")
            configs[category][key] = value
    return configs
