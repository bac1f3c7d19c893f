"""What `jax-monokernel bench` and the repository's benchmarks share: shapes, peers, and what is made of their times."""
