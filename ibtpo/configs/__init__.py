"""Settings that ship with the package: base files by task, and presets."""
