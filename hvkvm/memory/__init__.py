"""Guest RAM, memory slots, page overlays, and atomics on memory that a running guest shares."""
