"""`hvkvm matrix`: commands over kernels, SynICs, vCPUs and disks, as cases that run side by side."""
