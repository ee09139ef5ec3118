"""Faults planted in the Triton kernels to see that the proof finds them."""

# name -> the function it spoils, what is replaced, by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    "scale one percent off": ("small_kernel", "* SCALE\n    d_k", "* SCALE * 1.01\n    d_k"),
    "the mask stream of another matrix": ("small_kernel", "*(head, n, 1,", "*(head, n, 2,"),
    "keys beyond the end": ("_add_keys", 'tl.where(real, scores, float("-inf"))', "scores"),
    "delta dropped": ("_weights", "(d_p - delta[:, None])", "d_p"),
    "gradient through what was swapped": (
        "flash_queries_kernel",
        "tl.where(took_q, 0.0, d_q * SCALE)",
        "(d_q * SCALE)",
    ),
    "no rescaling of earlier keys": ("_add_keys", "out * shrink[:, None]", "out"),
    "the step ignored": ("swap_mask", "step.to(tl.uint32)", "(step * 0).to(tl.uint32)"),
    "half of the mean missing in the Gram gradient": ("gram_kernel", "mm - mr / 2", "mm"),
    "the layer of another group": ("project_kernel", "weight + (group", "weight + (group * 0"),
    "rows of a ragged group beyond its end": (
        "_rows",
        "real = rows < tl.load",
        "real = rows + 1 < tl.load",
    ),
    "the drop-out of another chunk": ("dropout_kernel", "first, 0, chunk)", "first, 0, 0)"),
}
