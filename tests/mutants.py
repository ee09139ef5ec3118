"""Faults planted in the Triton kernels to see that the proof finds them."""

# name -> the function it spoils, what is replaced, by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    "scale one percent off": ("small_gradient_kernel", "(SCALE * ", "(SCALE * 1.01 * "),
    "the mask stream of another matrix": ("_attentions", "*(head, n, 1,", "*(head, n, 2,"),
    "keys beyond the end": (
        "_add_keys",
        'tl.where(real[None, :], scores, float("-inf"))',
        "scores",
    ),
    "delta dropped": ("_weights", "(d_p - delta[:, None])", "d_p"),
    "gradient through what was swapped": (
        "through_mask",
        "tl.where(taken, 0.0, gradient)",
        "gradient",
    ),
    "no rescaling of earlier keys": ("_add_keys", "out * shrink[:, None]", "out"),
    "the step ignored": ("swap_mask", "step.to(tl.uint32)", "(step * 0).to(tl.uint32)"),
    "half of the mean missing in the Gram gradient": ("gram_gradient", "mm - mr / 2", "mm"),
    "half of the difference of the Gram matrices": (
        "_gram_difference",
        "half + tl.trans(half)",
        "2 * half",
    ),
    "the Gram gradient overwritten": ("flash_keys_kernel", "d_v += tl.load", "d_v += 0 * tl.load"),
    "losses added before every program has arrived": (
        "finish_sums",
        "programs - 1",
        "programs - 2",
    ),
    "one loss for the other": ("finish_sums", "partial + programs", "partial"),
    "the layer of another group": ("project_kernel", "weight + (group", "weight + (group * 0"),
    "rows of a ragged group beyond its end": (
        "_rows",
        "real = rows < tl.load",
        "real = rows + 1 < tl.load",
    ),
    "the upstream of the loss unscaled": ("gradients_kernel", ".to(tl.float32) * scale", " + 0"),
    "the dropout of another chunk": ("dropout_kernel", "first, 0, chunk)", "first, 0, 0)"),
    "tokens through the dropout of another chunk": ("_of_tokens", "begin // CHUNK", "0"),
    "what the projection's readers send back dropped": ("_upstream", "+ d_y.to(tl.float32)", ""),
}
