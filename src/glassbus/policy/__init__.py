"""Pure decisions: no asyncio, no clock, no I/O. Time and chance come in as arguments."""
