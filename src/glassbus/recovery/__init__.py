"""Acts on failure: kill switches, health; one file for each component that recovers."""
