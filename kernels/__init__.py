"""GPU kernels around the network: tokens to latents, camera frames to inputs, decoded pictures to geometry.

One folder an operation: `reference.py` (plain torch, float64 inside), `kernel.py` (Triton), and a public function in
the folder's `__init__.py` that runs the kernel on CUDA tensors and the reference elsewhere. `compile.py` makes
binaries ahead of time. Importing this package, or an operation's folder, loads neither torch nor triton.
"""
