"""Cases, sizes and contestants of the benchmarks, and their clock."""
