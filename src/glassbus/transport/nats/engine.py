"""The NATS thread: its event loop, its connection, and the state that follows the stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from glassbus.clock import Clock
from glassbus.config import Address, Credentials
from glassbus.errors import (
    EndpointRefused,
    EndpointUnreachable,
    GlassbusError,
    PublishUncertain,
    TransportError,
    safe_text,
)
from glassbus.facts import TransportRecovered, transport_failed
from glassbus.transport import Hold
from glassbus.transport.nats import records as r
from glassbus.transport.nats import snapshot
from glassbus.transport.nats.backlog import Backlog
from glassbus.transport.nats.connection import ANSWER_S, Link, StoreRefused
from glassbus.transport.nats.contents import Contents
from glassbus.transport.nats.follower import SILENCE_S, Follower
from glassbus.transport.nats.handing import Handing
from glassbus.transport.nats.mailbox import Mailbox
from glassbus.transport.nats.model import Book
from glassbus.transport.nats.requests import Answers, Close, Publish, Request
from glassbus.transport.nats.rounds import Rounds
from glassbus.transport.nats.runs import Runs
from glassbus.transport.nats.sending import Sending, bears
from glassbus.transport.nats.stream import Place, ensure
from glassbus.transport.nats.sweeping import Sweeper
from glassbus.transport.nats.view import NEVER, View

Result = TypeVar("Result")

_RETRY_S = 0.25
_RETRY_MAX_S = 10.0
_WATCH_S = 1.0


class Engine:
    """The thread and what it holds.

    `start`, `put`, `run`, `abandon` and `join` are for the bus's loop; `lock` for whoever reads `view` on another
    thread; the rest runs on the thread. `post` takes answers to the bus's loop, in order.
    """

    def __init__(
        self,
        place: Place,
        clock: Clock,
        post: Callable[[Answers], bool],
        loop_is_gone: Callable[[], bool],
        *,
        lease_s: float,
        name: str,
    ) -> None:
        self.place = place
        self.mailbox = Mailbox(clock)
        self.lock = threading.Lock()
        self.view = View(clock, self._held)
        self._clock = clock
        self._post_to_loop = post
        self._loop_is_gone = loop_is_gone
        self._orphaned = False  # the loop is gone: nobody wants anything any more
        self._name = name
        self._backlog = Backlog()
        self.contents = Contents(place, self.need_link)
        self._handing = Handing(self.contents, self.mailbox, lambda: self._answers, self._post, self._spawn)
        self._sweeper = Sweeper(place)
        self._rounds = Rounds(
            place,
            clock,
            self._backlog,
            self.view,
            self._sweeper,
            lease_s=lease_s,
            hand_out=self._handing.hand_out,
            tell=self._handing.tell,
        )
        self._handing.rounds = self._rounds
        self._answers = Answers()
        self._link: Link | None = None
        self._follower: Follower | None = None
        self._sending: Sending | None = None
        self._strays: dict[int, Sending] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing_links: set[asyncio.Task[Any]] = set()  # these are not cut short
        self._created: dict[str, str] = {}  # by address: which stream it was
        self._loaded = ""  # the stream that `view` was read from
        self._holds: dict[str, Hold] | None = None  # as they were told
        self._failed_since: float | None = None
        self._failures = 0
        self._closing = False
        self._over = False
        self._broken: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._registered: asyncio.Future[None] | None = None  # while somebody dials
        self._running = threading.Event()
        self._runs = Runs(self.mailbox)
        self._thread = threading.Thread(target=self._run, name="glassbus-nats", daemon=True)

    # For the bus's loop

    def start(self) -> None:
        """Start the thread."""
        self._clock.attach(self.mailbox)
        self.mailbox.ask_barrier = self._ask_barrier
        self._thread.start()
        self._running.wait()

    def put(self, request: Request) -> None:
        """Hand a request over; `mailbox.wake` must follow. Does not block."""
        self.mailbox.put(request)
        if self.mailbox.closed:
            self._refuse_rest(TransportError("the store is closed"))

    def run(self, make: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        """Run a coroutine on the thread; virtual time stands still until it has ended."""
        return self._runs.run(self._loop, make)

    def hold_back_low(self, name: str, held: bool) -> None:
        """Have no LOW message of `name` claimed from the next entry on, or have them claimed again."""
        with self.lock:
            names = self._rounds.low_held_back
            (names.add if held else names.discard)(name)
        self.mailbox.poke()

    @property
    def may_grow(self) -> bool:
        return self._rounds.publishing.may_grow

    @may_grow.setter
    def may_grow(self, allowed: bool) -> None:
        self._rounds.publishing.may_grow = allowed

    def abandon(self) -> None:
        """Stop as soon as possible: the deadline of `close` has passed."""
        self._over = True
        self.mailbox.wake()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end. It blocks, briefly once `close` has been answered."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # The thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        finally:
            self._clock.detach(self.mailbox)
            self.mailbox.close()
            self._running.set()
            self._runs.end()
            self._refuse_rest(self._broken or TransportError("the store is closed"))

    def _refuse_rest(self, error: BaseException) -> None:
        answers = Answers()
        self._backlog.take(self.mailbox.items)
        refusal = error if isinstance(error, GlassbusError) else TransportError(f"the store cannot go on: {error}")
        self._backlog.refuse_all(answers, refusal)
        if answers:
            self._post_to_loop(answers)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.mailbox.attach(self._loop)
        self._running.set()
        watch = self._spawn(self._watch(), counted=False)
        try:
            while True:
                self._step()
                if self._over:
                    break
                await self._rest()
        except Exception as error:  # noqa: BLE001 - whatever it is, the bus is told and nobody waits for ever
            self._broken = error
            self._answers.broken = error
            self._post()
        finally:
            watch.cancel()
            await self.hang_up()
            self._end_tasks()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _step(self) -> None:
        """Take what has come, and send the next entry if none is under way."""
        backlog = self._backlog
        backlog.take(self.mailbox.items)
        if backlog.close is not None and not self._closing:
            self._closing = True
            with self.lock:
                backlog.closing(self._answers)
        if self._orphaned and (self._link is None or self._rounds.left is not None):
            self._over = True
        if self._link is None:
            if backlog.publishes or backlog.calls:
                backlog.disconnected(EndpointUnreachable("there is no connection; nothing was sent"), self._answers)
            if self._closing and backlog.close is not None and not backlog.settlements and not backlog.settling:
                backlog.closed(0, self._answers)  # there is nothing to store that a connection would be waited for
                self._over = True
        elif self._sending is None and self._rounds.left is None:
            with self.lock:
                sending = self._rounds.compose(self._answers, closing=self._closing)
                self._sending = sending
            if sending is not None:
                self._spawn(self._send(self._link, sending))
        backlog.flushed(self._answers)
        self._post()

    async def _rest(self) -> None:
        connected = self._link is not None
        due = housekeeping = NEVER
        if connected and self._sending is None:
            with self.lock:
                due, housekeeping = self._rounds.next_due()
        now = self._clock.monotonic()
        # A clock that tests move is not asked to stop for housekeeping, which never ends, unless
        # there are others to look after.
        asked = min(due, housekeeping) if len(self.view.fold.owners) > 1 else due
        await self.mailbox.sleep(
            max(0.0, min(due, housekeeping) - now),
            None if asked == NEVER else asked,
            idle=self._sending is None or not connected,
        )

    def _end_tasks(self) -> None:
        for task in self._tasks - self._closing_links:
            task.cancel()

    def _post(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, Answers()
            if not self._post_to_loop(answers):
                self._orphan()

    def _orphan(self) -> None:
        """The loop is gone: give back what is ours, if we can, and end."""
        if not self._orphaned:
            self._orphaned = True
            self._backlog.close = self._backlog.close or Close(None)
            self.mailbox.stir()

    def _spawn(self, work: Coroutine[Any, Any, None], *, counted: bool = True) -> asyncio.Task[None]:
        """Run `work` beside the rest; `counted`: virtual time stands still until it has ended."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        if counted:
            self.mailbox.begin()

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                self._break(task.exception())
            if counted:
                self.mailbox.end()

        task.add_done_callback(ended)
        return task

    def _break(self, error: BaseException | None) -> None:
        """The store cannot go on."""
        if self._broken is None and error is not None:
            self._broken = error
            self._answers.broken = error
            self._post()
            self._over = True
            self.mailbox.stir()

    # Sending, and the verdict

    async def _send(self, link: Link, sending: Sending) -> None:
        try:
            await asyncio.gather(*(link.store(subject, body) for subject, body in sending.bodies))
        except StoreRefused as error:
            self._refused(sending, error)
            return
        except TransportError as error:
            link.fail(_loss(error))
            return
        sending.sent = True
        entries = sending.entries(self._clock.wall())
        stores = []
        for entry in entries:
            subject = self.place.bearing if bears(entry) else self.place.plain
            stores.append(link.store(subject, r.encode(entry)))
        answers = await asyncio.gather(*stores, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        refusals = [failure for failure in failures if isinstance(failure, StoreRefused)]
        if isinstance(answers[-1], StoreRefused):
            self._refused(sending, answers[-1])
        elif len(refusals) < len(failures):
            link.fail(_loss(next(f for f in failures if not isinstance(f, StoreRefused))))

    def _refused(self, sending: Sending, error: StoreRefused) -> None:
        """Certainly not stored: tell who cannot wait, and try the rest again."""
        if self._sending is not sending:
            return
        self._sending = None
        now, wall = self._clock.monotonic(), self._clock.wall()
        if self._failed_since is None:
            self._failed_since = now
            self._answers.facts.append(transport_failed(wall, "store", error))
        self._failures += 1
        self._entered()  # connected we are, though nothing can be stored
        with self.lock:
            self._rounds.retry_at = now + min(_RETRY_MAX_S, _RETRY_S * 2 ** min(self._failures - 1, 8))
            self._rounds.failed(sending, error, self._answers)
        self._post()
        self.mailbox.stir()

    def _on_entry(self, seq: int, stored: bytes) -> None:
        """An entry was read: let it take effect, and if it is ours, answer who asked for it."""
        entry = r.decode(stored, f"entry {seq} of the stream {self.place.stream}")
        rounds = self._rounds
        with self.lock:
            verdicts = self.view.fold.apply(entry, seq)
            rounds.signs[entry.owner] = self._clock.monotonic()
            if entry.owner == rounds.token:
                self._ours(entry, verdicts)
            elif rounds.token not in self.view.fold.owners and rounds.holding:
                self._expelled()
        self._sweeper.read(seq, len(stored))
        self.mailbox.stir()

    def _ours(self, entry: r.Entry, verdicts: list[Any] | None) -> None:
        sending = self._sending
        if sending is not None and sending.number == entry.number:
            self._sending = None
        else:
            sending = self._strays.pop(entry.number, None)
            if sending is None:
                return  # a part of a publish, or one that a later entry has made void
        if verdicts is None:
            self._expelled()
            sending.undo()
            return
        for number in [n for n in self._strays if n < entry.number]:
            del self._strays[number]
        self._entered()
        sending.finish(verdicts, self._answers)
        if self._failed_since is not None:
            after_s = self._clock.monotonic() - self._failed_since
            self._answers.facts.append(TransportRecovered(at=self._clock.wall(), after_s=after_s))
            self._failed_since, self._failures = None, 0
        if self._rounds.left is not None:
            self._backlog.flushed(self._answers)
            self._backlog.closed(self._rounds.left, self._answers)
            self._post()

    def _entered(self) -> None:
        """Something of ours was read, or refused: the connection works both ways."""
        if self._registered is not None and not self._registered.done():
            self._registered.set_result(None)

    def _expelled(self) -> None:
        self._rounds.begin_anew()
        self._strays.clear()

    def _held(self, book: Book) -> None:
        if self._holds is not None:
            self._holds[book.name] = book.hold
        if self.view.live:
            self._answers.holds.append((book.name, book.hold))

    # The connection

    def need_link(self) -> Link:
        """The connection there is. Raises EndpointUnreachable when there is none."""
        if self._link is None:
            raise EndpointUnreachable("there is no connection")
        return self._link

    async def dial(self, address: Address, credentials: Credentials | None) -> None:
        """See `Dialer`."""
        await self.hang_up()
        link = Link(address, self._lost)
        registered = self._registered = self._loop.create_future()
        try:
            await link.connect(self._name, credentials)
            await self._follow(link, str(address))
            self._link = link
            with self.lock:
                self._rounds.publishing.max_payload = link.max_payload
                self._connected()
            self.mailbox.stir()
            async with asyncio.timeout(ANSWER_S):
                await registered
        except BaseException as error:
            self._registered = None
            await link.close()
            await self.hang_up()
            if isinstance(error, TimeoutError):
                raise EndpointUnreachable(f"{address} did not store what we wrote within {ANSWER_S:.0f} s") from error
            raise
        self._registered = None

    async def _follow(self, link: Link, where: str) -> None:
        """Read the stream as far as it goes, from where we are in it, or from its newest snapshot."""
        found = await ensure(link, self.place, make=where not in self._created)
        self._created[where] = found.created
        self._sweeper.limit(found)
        if self._loaded != found.created:
            self._forget_all()
        for _ in range(5):
            _, head = await snapshot.read_head(link, self.place)
            if head is not None and head.seq > self.view.fold.seq:
                whole = await snapshot.read(link, self.place, head)
                if whole is None:
                    continue
                self._forget_all()
                with self.lock:
                    snapshot.load(self.view.fold, whole)
            self._loaded = found.created
            began = self.view.fold.seq
            follower = Follower(
                link,
                self.place.stream,
                self.place.entries,
                self.view.fold.seq,
                self._on_entry,
                lambda error: self._reading_failed(link, error),
            )
            self._follower = follower
            await follower.catch_up()
            _, after = await snapshot.read_head(link, self.place)
            if after is None or after.seq <= began or after == head:
                self._sweeper.head_seq = after.seq if after is not None else 0
                return
            # A newer snapshot came meanwhile, so what is before it may have been deleted before we read it.
            await follower.close()
            self._forget_all()
        raise EndpointUnreachable(f"the store on {where} changes faster than it can be read")

    def _forget_all(self) -> None:
        """Begin with nothing: another stream, or one that went on too far without us."""
        with self.lock:
            self.view = self._rounds.view = View(self._clock, self._held)
            self._loaded = ""

    def _connected(self) -> None:
        """All that is in the stream was read: what of ours is not in it was not stored."""
        self.view.live = True
        before, self._holds = self._holds, {name: book.hold for name, book in self.view.fold.books.items()}
        # What was read of the past is no news, but what changed while we were away is.
        self._answers.holds = [
            (name, hold) for name, hold in self._holds.items() if before is not None and before.get(name, hold) != hold
        ]
        now = self._clock.monotonic()
        for token in self.view.fold.owners:
            self._rounds.signs[token] = now
        sending, self._sending = self._sending, None
        if sending is not None:
            self._strays[sending.number] = sending
            sending.undo()
        self._rounds.fence = self._rounds.reconcile = True
        if not self._rounds.registered and (self._rounds.holding or self._strays):
            self._expelled()

    def _reading_failed(self, link: Link, error: Exception) -> None:
        if isinstance(error, EndpointUnreachable | EndpointRefused):
            link.fail(error)
        else:
            self._break(error)

    def _lost(self, error: EndpointUnreachable | EndpointRefused) -> None:
        """The connection broke: who waits for an answer that may never come is told so."""
        link, self._link = self._link, None
        if link is not None:
            closing = self._spawn(link.close(), counted=False)
            self._closing_links.add(closing)
            closing.add_done_callback(self._closing_links.discard)
        if self._follower is not None:
            self._spawn(self._follow_no_more(), counted=False)
        self.view.live = False
        self._leave_in_doubt(error)
        if self._registered is None:
            self._answers.lost = error
        elif not self._registered.done():  # whoever dials is told
            self._registered.set_exception(error)
        self._post()
        self.mailbox.stir()

    def _leave_in_doubt(self, error: EndpointUnreachable | EndpointRefused) -> None:
        sending = self._sending
        if sending is None:
            return
        text = safe_text(error)
        for publish in sending.publishes:
            if not publish.future.done():
                publish.uncertain = True  # so that it is not sent again
                self._answers.failed.append((publish.future, _doubt(publish, text) if sending.sent else error))
        uncertain_call = EndpointUnreachable(f"it is not known whether it was stored: {text}")
        self._answers.failed.extend((call.future, uncertain_call) for call in sending.calls)

    async def _follow_no_more(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            await follower.close()

    async def hang_up(self) -> None:
        """See `Dialer`."""
        await self._follow_no_more()
        link, self._link = self._link, None
        self.view.live = False
        if link is not None:
            self._leave_in_doubt(EndpointUnreachable(f"the connection to {link.address} was given up"))
            self._post()
            await link.close()
            self.mailbox.stir()

    async def _watch(self) -> None:
        """Whether the server still sends, and whether entries are to be swept up. In real time."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._loop_is_gone():
                self._orphan()
            link, follower = self._link, self._follower
            if link is None or follower is None:
                continue
            if follower.silent_s > SILENCE_S:
                link.fail(EndpointUnreachable(f"{link.address} sent nothing for {SILENCE_S:.0f} s"))
                continue
            await self._sweep(link)

    async def _sweep(self, link: Link) -> None:
        try:
            swept = await self._sweeper.look(link, self.view.fold, self._rounds.token)
            if swept:
                self._rounds.swept = swept
                self.mailbox.stir()
        except StoreRefused as error:
            self._answers.facts.append(transport_failed(self._clock.wall(), "snapshot", error))
            self._post()
        except TransportError as error:
            link.fail(_loss(error))

    # Clocks that tests move

    def _ask_barrier(self) -> bool:
        """Have all read that is in the stream, if others may have written; whether that was asked."""
        if self._follower is None or len(self.view.fold.owners) < 2:
            return False
        self.run(self._barrier).add_done_callback(lambda _: self.mailbox.end())
        return True

    async def _barrier(self) -> None:
        follower = self._follower
        if follower is None:
            return
        try:
            await follower.barrier()
        except TransportError:
            return  # the connection broke, which is told elsewhere
        finally:
            self.mailbox.stir()


def _doubt(publish: Publish, cause: str) -> PublishUncertain:
    doubt = PublishUncertain(publish.batch[0].id, cause)
    doubt.message_ids = tuple(envelope.id for envelope in publish.batch)
    return doubt


def _loss(error: BaseException) -> EndpointUnreachable | EndpointRefused:
    if isinstance(error, EndpointUnreachable | EndpointRefused):
        return error
    return EndpointUnreachable(safe_text(error))
