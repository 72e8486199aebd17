"""The answers that the built-in rules can give, each by a name, and nothing else.

Telemetry makes a series for each of them before the first error, so a new pair is
a new verdict here, never an expression somewhere in a rule.
"""

from __future__ import annotations

from collections.abc import Callable

from glassbus.errors import ErrorCategory, ErrorSeverity

Classification = tuple[ErrorCategory, ErrorSeverity]

_C, _S = ErrorCategory, ErrorSeverity

#: What is on the other side cannot be reached or does not work: later, or another endpoint, may do.
CONNECTION: Classification = (_C.CONNECTION_ERROR, _S.HIGH)
#: The store is damaged: no later attempt mends it.
CORRUPT: Classification = (_C.CONNECTION_ERROR, _S.CRITICAL)
#: It may be there, and it may be working, but not within the time given.
TIMEOUT: Classification = (_C.TIMEOUT_ERROR, _S.HIGH)
#: A handler that nobody can stop.
HANGING: Classification = (_C.TIMEOUT_ERROR, _S.CRITICAL)
#: Who we are, or what we may do, is not accepted.
ACCESS: Classification = (_C.AUTHENTICATION_ERROR, _S.HIGH)
#: Memory, disk, file descriptors: the machine is at its end.
EXHAUSTED: Classification = (_C.RESOURCE_EXHAUSTION, _S.CRITICAL)
#: A limit was reached, ours or the other side's: doing less helps.
LIMITED: Classification = (_C.RESOURCE_EXHAUSTION, _S.HIGH)
#: A bounded queue or buffer is full.
OVERFLOW: Classification = (_C.QUEUE_OVERFLOW, _S.HIGH)
#: Bytes and values do not go into each other.
UNREADABLE: Classification = (_C.SERIALIZATION_ERROR, _S.MEDIUM)
#: The program was set up wrong: no message can work until somebody mends it.
MISCONFIGURED: Classification = (_C.CONFIGURATION_ERROR, _S.HIGH)
#: Something is wrong with this message, or with the code that handles it.
PROCESSING: Classification = (_C.MESSAGE_PROCESSING_ERROR, _S.MEDIUM)
#: A handler asked the whole process to end.
EXIT: Classification = (_C.MESSAGE_PROCESSING_ERROR, _S.HIGH)
#: The process that handled it died, or the interpreter is broken.
FATAL: Classification = (_C.MESSAGE_PROCESSING_ERROR, _S.CRITICAL)
#: What an exception is that no rule names.
UNKNOWN: Classification = (_C.MESSAGE_PROCESSING_ERROR, _S.LOW)

#: Every (category, severity) pair that the built-in rules can yield.
CLASSIFICATIONS: frozenset[Classification] = frozenset(
    {
        CONNECTION, CORRUPT, TIMEOUT, HANGING, ACCESS, EXHAUSTED, LIMITED, OVERFLOW, UNREADABLE, MISCONFIGURED,
        PROCESSING, EXIT, FATAL, UNKNOWN,
    }
)  # fmt: skip

#: What a look at one exception found: an answer, another exception that knows better, or nothing.
Finding = Classification | BaseException | None
Look = Callable[[BaseException], Finding]
