"""Kernels, segments and libraries."""
