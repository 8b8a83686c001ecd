"""``cdssl bench``: what this machine can do, and how the parts of the system compare with alternatives.

Every figure is the median of repeated runs. Alternatives are run on the same data, in turns with ours, so that a busy
machine affects all alike. Each benchmark is a module with ``add_arguments(parser)``, ``measure(args) -> Figures`` and
``table(figures) -> str``.
"""
