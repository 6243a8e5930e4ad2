"""Triton kernels and their launchers, one module a stem; backend.py decides when they run."""
