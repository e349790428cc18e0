"""Kernels: attention, sealing, linears, norms for x86-64 CPUs (csrc/); the first two for GPUs."""
