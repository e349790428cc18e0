"""Text with known answers: for benchmarks, the demo and training."""
