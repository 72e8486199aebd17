"""The Grafana boards of Glassbus, as data: `python -m dashboards.build` writes json/, which is what Grafana reads.

`promql.py` makes queries whose names are the catalogue's; `grafana.py` is all that grafanalib lacks; `panels.py` has
one call for each kind of panel; `frame.py` is what every board has; each board is one more file.
"""
