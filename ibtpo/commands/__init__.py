"""Commands of the command line, one module each: its flags, and `run`.

Nothing that takes time to load is imported before a command is run: `--help` and completion answer at once.
"""
