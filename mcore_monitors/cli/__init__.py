"""The ``mcore-monitors`` command: one module a subcommand, each with ``add_parser`` and ``run``."""
