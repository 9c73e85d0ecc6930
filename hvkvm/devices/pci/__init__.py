"""PCI: configuration space, the host bridge, the devices behind it. For machines that have it only."""
