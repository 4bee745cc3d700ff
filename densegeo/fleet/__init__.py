"""Bundles on engines for many processes and machines: Triton Inference Server and Ray."""
