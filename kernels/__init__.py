"""GPU kernels around the network: tokens to latents, camera frames to inputs, decoded pictures to geometry.

One folder an operation, and nothing outside of it lists the folder: `reference.py` (plain torch, float64 inside),
`kernel.py` (Triton, the arguments of a launch, and `VARIANTS`, the rows that are compiled ahead of time), and a public
function in the folder's `__init__.py` that runs the kernel on CUDA tensors and the reference elsewhere. Where a runtime
without torch launches the kernel too, its arguments stand in `arguments.py`.

`table.py` finds the rows, `launch.py` launches one through Triton, `compile.py` makes binaries of all. Importing this
package, or an operation's folder, loads neither torch nor triton.
"""
