"""What the bus remembers: counts, reports, and the story of each message."""
