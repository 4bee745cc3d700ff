"""Bilinear sampling as `resize_plain` and `resize_antialiased` of the runtime define it; shared by the operations."""
