"""Messages in a SQLite file: durable, and shared safely by several processes of one machine.

transport.py    the port, on the loop: hands requests over, resolves futures
requests.py     what goes to the writer and what comes back
mailbox.py      how the writer thread sleeps and is woken
writer.py       the thread: when it works, and how long it sleeps
rounds.py       one transaction for everything that waits
backlog.py      requests taken and not yet answered
transaction.py  what the stages of one transaction share
settling.py     stage 1: where deliveries go next
upkeep.py       stage 2: what becomes due by itself
admin.py        stage 3: subscriptions and dead letters
publishing.py   stage 4: recognised, routed, admitted, written
claiming.py     stage 5: waiting consumers are given what is ready
books.py        the cache of what is stored about subscriptions
membership.py   this process as an owner of deliveries
owners.py       locks and leases, and how a death is seen
health.py       when the store fails
store.py        the file, its connection, and what SQLite's errors mean
schema.py       the tables, and migrations
sql.py          few, large statements
reading.py      ledger, queues, audit: on a connection of their own
"""

from glassbus.transport.sqlite.publishing import DUPLICATE_WINDOW_S
from glassbus.transport.sqlite.transport import SqliteTransport

__all__ = ["DUPLICATE_WINDOW_S", "SqliteTransport"]
