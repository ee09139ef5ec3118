"""Every method by name: its terms, and the inputs of those terms.

`cross_entropy` is in every method. A method is a name of METHODS or any sum of them, `gl+pca+logits`; the weights
of the terms are in params.yaml. `trans` is not a loss but the student-only transform of eq. 7; `adversarial` is
L_MVG (eq. 9), whose discriminator the trainer steps by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.dataclasses import dataclass

from pipeline.core.config import STRICT
from pipeline.core.errors import UserError, nearest
from pipeline.distill.methods.ab import Ab, AbConfig
from pipeline.distill.methods.afd import Afd, AfdConfig
from pipeline.distill.methods.affinity import Affinity, AffinityConfig
from pipeline.distill.methods.at import At, AtConfig
from pipeline.distill.methods.cakd import Gl, Pca
from pipeline.distill.methods.crd import Crd, CrdConfig
from pipeline.distill.methods.deit import Deit, DeitConfig
from pipeline.distill.methods.dkd import Dkd, DkdConfig
from pipeline.distill.methods.fitnet import Fitnet, FitnetConfig
from pipeline.distill.methods.ft import Ft, FtConfig
from pipeline.distill.methods.irg import Irg, IrgConfig
from pipeline.distill.methods.logits import Logits
from pipeline.distill.methods.london import London, LondonConfig
from pipeline.distill.methods.minilm import Minilm, MinilmConfig
from pipeline.distill.methods.ofa import Ofa, OfaConfig
from pipeline.distill.methods.ofd import Ofd, OfdConfig
from pipeline.distill.methods.queue import Queue, QueueConfig
from pipeline.distill.methods.reviewkd import Reviewkd, ReviewkdConfig
from pipeline.distill.methods.rkd import Rkd, RkdConfig
from pipeline.distill.methods.rsd import Rsd, RsdConfig
from pipeline.distill.methods.scalekd import Scalekd, ScalekdConfig
from pipeline.distill.methods.term import Term
from pipeline.models.teacher import Layer

METHODS: dict[str, tuple[str, ...]] = {
    "plain": (),
    # Plain on the batches of the distilled methods: the control of all of them.
    "control": (),
    "logits": ("logits",),
    "dkd": ("dkd",),
    "fitnet": ("fitnet",),
    "at": ("at",),
    "rkd": ("rkd",),
    "irg": ("irg",),
    "crd": ("crd",),
    "ofa": ("ofa",),
    "rsd": ("rsd",),
    "minilm": ("minilm",),
    "queue": ("queue",),
    "affinity": ("affinity",),
    "ofd": ("ofd",),
    "reviewkd": ("reviewkd",),
    "london": ("london",),
    "afd": ("afd",),
    "ab": ("ab",),
    "ft": ("ft",),
    "deit": ("deit",),
    "scalekd": ("scalekd",),
    # The rows of the paper's ablation, and all of it.
    "gl": ("gl",),
    "pca": ("pca",),
    "robust": ("adversarial", "trans"),
    "cakd": ("pca", "gl", "adversarial", "trans"),
    # A control: what the student-only transform does by itself.
    "trans": ("trans",),
}
TERMS: dict[str, tuple[type[Term], str]] = {  # name -> class, and its settings' name
    "logits": (Logits, "logits"),
    "dkd": (Dkd, "dkd"),
    "fitnet": (Fitnet, "fitnet"),
    "at": (At, "at"),
    "rkd": (Rkd, "rkd"),
    "irg": (Irg, "irg"),
    "crd": (Crd, "crd"),
    "ofa": (Ofa, "ofa"),
    "rsd": (Rsd, "rsd"),
    "minilm": (Minilm, "minilm"),
    "queue": (Queue, "queue"),
    "affinity": (Affinity, "affinity"),
    "ofd": (Ofd, "ofd"),
    "reviewkd": (Reviewkd, "reviewkd"),
    "london": (London, "london"),
    "afd": (Afd, "afd"),
    "ab": (Ab, "ab"),
    "ft": (Ft, "ft"),
    "deit": (Deit, "deit"),
    "scalekd": (Scalekd, "scalekd"),
    "pca": (Pca, "cakd"),
    "gl": (Gl, "cakd"),
}
OUTPUTS = {  # what a term may read of the teacher, in words
    "logits": "logits",
    "pooled": "pooled embedding",
    "tokens": "tokens",
    "qkv": "queries, keys and values",
}
STORED = {  # cache.layout -> what is read or replayed from it
    "block_input": {*OUTPUTS},
    "qkvh": {"logits", "tokens", "qkv"},
    "logits": {"logits"},
}
WITHOUT_LOSS = ("adversarial", "trans")  # no Term: the discriminator's, and a transform


@dataclass(frozen=True, config=STRICT)
class Terms:
    """`distill.terms:` the settings of every other method; defaults are the papers', or say whose."""

    dkd: DkdConfig = DkdConfig()
    fitnet: FitnetConfig = FitnetConfig()
    at: AtConfig = AtConfig()
    rkd: RkdConfig = RkdConfig()
    irg: IrgConfig = IrgConfig()
    crd: CrdConfig = CrdConfig()
    ofa: OfaConfig = OfaConfig()
    rsd: RsdConfig = RsdConfig()
    minilm: MinilmConfig = MinilmConfig()
    queue: QueueConfig = QueueConfig()
    affinity: AffinityConfig = AffinityConfig()
    ofd: OfdConfig = OfdConfig()
    reviewkd: ReviewkdConfig = ReviewkdConfig()
    london: LondonConfig = LondonConfig()
    afd: AfdConfig = AfdConfig()
    ab: AbConfig = AbConfig()
    ft: FtConfig = FtConfig()
    deit: DeitConfig = DeitConfig()
    scalekd: ScalekdConfig = ScalekdConfig()


def terms_of(method: str) -> tuple[str, ...]:
    """The terms of a method beside the cross-entropy, each once, in the order of its parts.

    Raises UserError: an unknown part, `robust` without `gl`, a sum that names a term twice.
    """
    terms: list[str] = []
    for part in method.split("+"):
        if part not in METHODS:
            whose = "" if part == method else f", whose part {part!r} is no method"
            raise UserError(f"method: got {method!r}{whose}; {nearest(part, METHODS)}")
        terms += METHODS[part]
    twice = sorted({term for term in terms if terms.count(term) > 1})
    if twice:
        raise UserError(
            f"method: got {method!r} with {twice[0]!r} twice; expected each part once; remove one"
        )
    if "adversarial" in terms and "gl" not in terms:
        raise UserError(
            f"method: got {method!r}, whose discriminator reads h'_S of gl; expected gl in the sum; add gl"
        )
    if "control" in method.split("+") and set(terms) - {"trans"}:
        raise UserError(
            f"method: got {method!r}; expected nothing but trans beside control, which reads no teacher; remove "
            "control"
        )
    return tuple(terms)


def reads(method: str, side: str) -> frozenset[str]:
    """Return the inputs of a method's terms from the `teacher` or the `student`; empty where there are none."""
    classes = [TERMS[term][0] for term in terms_of(method) if term not in WITHOUT_LOSS]
    return frozenset().union(*(getattr(c, side) for c in classes))


def paired(method: str) -> bool:
    """Whether a method's batches have cached views: methods that read the teacher, and their control."""
    return "control" in method.split("+") or bool(reads(method, "teacher"))


def check_attention(method: str, reason: str | None) -> None:
    """Raise UserError where a method reads Q, K, V and the teacher, for this reason, has none."""
    reading = _attention_terms(terms_of(method))
    if reason is None or not reading:
        return
    free = [name for name, terms in METHODS.items() if not _attention_terms(terms)]
    raise UserError(
        f"method: {method!r} reads the teacher's queries, keys and values ({', '.join(reading)}), and this one "
        f"has none for it: {reason}; choose another teacher, or a sum of {', '.join(free)}"
    )


def _attention_terms(terms: Iterable[str]) -> list[str]:
    return [term for term in terms if term in TERMS and "qkv" in TERMS[term][0].teacher]


def check_stored(method: str, stored: Mapping[str, Any], layer: Layer = "last") -> None:
    """Raise UserError where a method reads features that the store, by its manifest, does not have."""
    check_attention(method, stored.get("no_attention"))
    reading = reads(method, "teacher")
    using = [term for term in terms_of(method) if term in TERMS and TERMS[term][0].statistics]
    if layer == "before_last" and using:
        raise UserError(
            f"distill.cakd.layer: got before_last for {method!r}, which uses channel statistics ({using[0]}); "
            "expected last, the layer whose statistics the feature cache has; set it"
        )
    if layer == "before_last" and stored["mode"] == "on":
        if "qkv" in reading:
            raise UserError(
                f"distill.cakd.layer: got before_last for {method!r}, which reads Q, K, V; expected last, as the "
                "feature cache has the input of the last block alone; use gl without pca, or cache.mode: off"
            )
        if "tokens" in reading and stored["layout"] == "qkvh":
            raise UserError(
                f"distill.cakd.layer: got before_last for {method!r} with cache.layout qkvh; expected "
                "block_input, which has x_L; set it"
            )
    missing = [OUTPUTS[name] for name in OUTPUTS if name in reading - STORED[stored["layout"]]]
    if missing and stored["mode"] == "on":
        raise UserError(
            f"method: got {method!r}, which reads the teacher's {' and '.join(missing)}, with cache.layout "
            f"{stored['layout']}; expected block_input; set it, or cache.mode: off"
        )
