"""Saved machines: the file they lie in, and how a part's state is written there."""
