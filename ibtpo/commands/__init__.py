"""Commands of the command line that need no model: one module each."""
