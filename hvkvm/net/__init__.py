"""The network behind a guest's NIC: what a NIC sends to and gets frames from, kind by kind."""
