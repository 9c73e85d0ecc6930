"""virtio 1.x devices on the PCI bus."""
