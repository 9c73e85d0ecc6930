"""The machine-level steps behind the commands in this folder; not part of the installed library."""
