"""What befalls the buses of drills: one class a fault, by what it befalls.

Every class says in its docstring what goes wrong and how it heals; the table (`drill/table.py`) says which alerts
that must make.
"""
