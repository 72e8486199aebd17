"""Fire drills: for each alert that ships, the fault that must make it fire, played on real servers at another speed.

`glassbus drill` runs them (`docs/drills.md`). From the outside in: `run.py` plays, `world.py` is what is played in,
`stack.py` the Prometheus and the Alertmanager, `site.py` a process with buses, `scenes/` and `outside.py` the faults,
`table.py` which fault makes which alert. `rules.py` and `durations.py` are the other speed.
"""
