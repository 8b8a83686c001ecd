"""Triton kernels for the training step on NVIDIA GPUs, beside the reference in plain torch.

What is per edge stays in registers between its layers: nothing of E × hidden or E × Gaussians is kept for the backward
pass, which computes it again. Sums over the edges of an atom follow ``row_ptr``, and ``mirror`` where the atom sends,
so that there are no atomics and two runs give the same bits. Weight gradients are partial sums, one for each program,
added up in a fixed order. Dot products take what the weights are (bf16, or f32 as three products of TF32) and add up
in f32; activations are f32. Checked in Triton's interpreter and compiled for an H100, so far run on no GPU.

Widths are powers of two from 16 to 128: a program holds whole layers. Wider models belong to cuBLAS and the reference.
"""
