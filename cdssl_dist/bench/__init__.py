"""``cdssl bench``: what this machine can do, and how the parts of the system compare with what others use.

Every figure is the median of repeated runs. What stands beside ours is run on the same data, in turns, so that a busy
machine is busy for all. Each benchmark is a module with ``add_arguments(parser)``, ``measure(args) -> Figures`` and
``table(figures) -> str``.
"""
