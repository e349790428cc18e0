"""Kernels: attention, sealing, linears and norms for x86-64 CPUs, see csrc/; attention for GPUs."""
