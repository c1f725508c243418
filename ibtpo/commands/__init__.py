"""Commands of the command line, one module each: its flags, and `run`.

Modules that are slow to load are only imported when a command runs, so that `--help` and completion are fast.
"""
