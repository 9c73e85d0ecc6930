"""An NVMe controller with one namespace: a disk that Linux, Windows and UEFI firmware have a driver for."""
