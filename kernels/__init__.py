"""The formulas in C (CPU) and CUDA (GPU), compiled; their NumPy definitions are in mpiclip.ops and mpiclip.problems."""
