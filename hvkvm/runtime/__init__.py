"""Who runs what: vCPU threads with their work queues and kicks, and the I/O loop."""
