"""The sections of a run's settings, a module each, named as in YAML and flags; ibtpo/config.py puts them together."""
