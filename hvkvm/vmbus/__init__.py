"""The VMBus host: control plane, GPADLs and rings. Above `hyperv`, below the devices."""
