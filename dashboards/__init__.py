"""The Grafana boards of Glassbus, as data: `python -m dashboards.build` writes json/, which is what Grafana reads.

`promql.py` makes queries whose names are the catalogue's; `grafana.py` is all that grafanalib lacks; `look.py` has
colours, units and levels; `panels.py` one call for each kind of panel; `frame.py` what every board has. Each board is
one more file.
"""
