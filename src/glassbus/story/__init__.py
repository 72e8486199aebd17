"""The story of one message: what the journals tell and what the store has, put together.

    record.telling ──Told──┐
                           ├── tell() ──> Story ──> `glassbus explain`, `bus.explain`
    transport.Locates ─────┘
      Whereabouts, dead letters, queues

Pure: it reads nothing, asks nothing, and may be given whatever a damaged journal holds.
"""

from glassbus.story.asking import ask
from glassbus.story.model import (
    Around,
    DeliveryStory,
    Failure,
    Now,
    Published,
    Step,
    Story,
    TraceOfStory,
)
from glassbus.story.tell import FORGETS, Asked, tell

__all__ = [
    "FORGETS",
    "Around",
    "Asked",
    "DeliveryStory",
    "Failure",
    "Now",
    "Published",
    "Step",
    "Story",
    "TraceOfStory",
    "ask",
    "tell",
]
