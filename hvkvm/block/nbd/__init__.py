"""A client of NBD servers, such as qemu-nbd and nbdkit, after the protocol's own document (doc/proto.md)."""
