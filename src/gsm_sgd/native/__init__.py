"""A step in C for float32 on a CPU, built by the compiler that is there; all else is torch's operations."""
