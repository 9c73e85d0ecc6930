"""VMBus devices, host side: one file a device."""
