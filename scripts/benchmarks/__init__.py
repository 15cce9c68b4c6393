"""Benchmarks, one module each: a line of documentation and `run(arguments) -> None`."""
