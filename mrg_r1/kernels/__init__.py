"""Kernels for float32 on a CPU, in C: what torch makes of many small ones, compiled once where there is a compiler."""
