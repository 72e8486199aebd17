"""The command `glassbus`."""
