"""Settings that ship with the package: a base file a task."""
