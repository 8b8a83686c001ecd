"""Triton kernels for the training step on NVIDIA GPUs, alongside the reference in plain torch.

Values per edge stay in registers between layers: nothing of size E × hidden or E × Gaussians is kept for the backward
pass, which recomputes it. Sums over the edges of an atom follow ``row_ptr`` (via ``mirror`` for edges that the atom
sends), so that there are no atomics, and results are reproducible bit for bit. Weight gradients are partial sums, one
per program, added up in a fixed order. Dot products take the type of the weights (bf16, or f32 as three TF32 products)
and accumulate in f32; activations are f32. Checked in Triton's interpreter and compiled for an H100, but not yet run
on a GPU.

Widths are powers of two from 16 to 128, since a program holds whole layers. Wider models should use the reference,
and so cuBLAS.
"""
