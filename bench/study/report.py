"""What the study found, in words and numbers: the text that is kept, and the README's section."""

from __future__ import annotations

import math

from internals import aligned
from readme import markdown
from tables import filled

from .findings import Findings, Fit, Mean
from .plan import BUDGET_LR, METHODS, RIVALS, SCHEDULES
from .train import BATCH, NOISE, STEPS_AN_EPOCH, TRAIN

Rows = list[tuple[str, ...]]


def signed(slope: int) -> str:
    """A whole slope, as it is printed."""
    return f"{slope:+d}" if slope else "0"


def verdict(measured: Fit, expected: float) -> str:
    """Whether a slope is the expected one: its interval holds it, it is within 0.5 of it, or neither."""
    if math.isnan(measured.slope):
        return "no ridge"
    if measured.low <= expected <= measured.high:
        return "yes"
    return "nearly" if abs(measured.slope - expected) < 0.5 else "no"


def ridges(found: Findings) -> Rows:
    """(a) Slopes, and the best error, of every method and network."""
    rows: Rows = [
        ("network", "method", "lowest error, %", "slope (95%)", "derived", "seen?", "paper's reading", "seen?")
    ]
    for k, network in enumerate(NOISE):
        for name, method in METHODS.items():
            measured = found.ridge(name, network)
            derived = method.slopes[k]
            lowest = 100 * found.table(name, network).mean(-1).min()
            texts = (signed(derived), verdict(measured, derived), signed(method.claim), verdict(measured, method.claim))
            rows.append((network, name, f"{lowest:.2f}", str(measured), *texts))
    return rows


def difference(found: Findings, network: str, schedule: str) -> Mean:
    """How far AdamW's test error is below Adam-L2's, seed by seed."""
    one, other = (found.finals[network, name, schedule] for name in RIVALS)
    return Mean.of(one - other)


def schedules(found: Findings) -> Rows:
    """(b) Test errors of what was best, and their difference, seed by seed."""
    rows: Rows = [("network", "schedule", *(f"{name}, %" for name in RIVALS), "difference, %", "95%")]
    for network in NOISE:
        for schedule in SCHEDULES:
            one, other = (found.finals[network, name, schedule] for name in RIVALS)
            gap = difference(found, network, schedule)
            low, high = (100 * (gap.value + sign * 1.96 * gap.error) for sign in (-1, 1))
            texts = (f"{100 * gap.value:+.2f}", f"{low:+.2f} to {high:+.2f}")
            rows.append((network, schedule, str(Mean.of(one)), str(Mean.of(other)), *texts))
    return rows


def budgets(found: Findings) -> Rows:
    """(c) The exponent of the best weight decay over the number of steps."""
    rows: Rows = [("network", "lr", "exponent of λ (95%)", "of λ √steps", "-0.5 seen?")]
    for network, lr in BUDGET_LR.items():
        raw = found.budget(network)
        normal = "none" if math.isnan(raw.slope) else f"{raw.slope + 0.5:+.2f}"
        rows.append((network, f"{lr:g}", str(raw), normal, verdict(raw, -0.5)))
    return rows


def anytime(found: Findings) -> Rows:
    """(d) Errors at the ends of AdamWR's periods."""
    ends = found.plan.period_ends()
    rows: Rows = [("network", "after epoch", *(str(end) for end in ends))]
    for (network, name), values in found.anytime.items():
        rows.append((network, name, *(str(Mean.of(values[end - 1])) for end in ends)))
    return rows


PARTS = (
    ("Slope of ln(best weight decay) over ln(lr), cosine schedule", ridges),
    ("Test error of what was best, with new seeds: mean ± standard error", schedules),
    ("Best weight decay of AdamW independent against the number of steps", budgets),
    ("Error on held-out digits at the ends of AdamWR's periods: mean ± standard error", anytime),
)


def render(found: Findings) -> str:
    """All tables as text."""
    head = ", ".join(f"{key} {value}" for key, value in found.about.items())
    return "\n\n".join([head, *(f"{title}\n\n{aligned(make(found))}" for title, make in PARTS)]) + "\n"


def claims(found: Findings) -> Rows:
    """What the literature says, and whether it was seen here."""
    rows: Rows = [("claim", *(f"on the {network} network" for network in NOISE))]
    for text, claim in (("Coupled, the best λ falls as 1/lr", -1), ("Decoupled, the best λ does not depend on lr", 0)):
        names = [method.name for method in METHODS.values() if method.claim == claim]
        rows.append((text, *(_slopes([found.ridge(name, network) for name in names], claim) for network in NOISE)))
    better, ahead, exponents = [], [], []
    for network in NOISE:
        words = []
        for schedule in SCHEDULES:
            gap = difference(found, network, schedule)
            beyond = abs(gap.value) > 1.96 * gap.error
            words.append(f"{schedule}: {'not to be told' if not beyond else 'yes' if gap.value > 0 else 'no, above'}")
        better.append("; ".join(words))
        exponent = found.budget(network)
        exponents.append(f"{verdict(exponent, -0.5)}: exponent {exponent}")
        ends = found.plan.period_ends()
        means = {name: values.mean(-1) for (own, name), values in found.anytime.items() if own == network}
        wins = [end for end in ends if means["AdamWR"][end - 1] <= min(own[end - 1] for own in means.values())]
        ahead.append(f"the lowest error of the four at the end of {len(wins)} of its {len(ends)} periods")
    rows.append(("AdamW's best test error is below Adam-L2's", *better))
    rows.append(("The best λ falls as 1/√steps", *exponents))
    rows.append(("AdamWR is ahead at any time", *ahead))
    return rows


def _slopes(measured: list[Fit], claim: int) -> str:
    verdicts = [verdict(own, claim) for own in measured]
    low, high = (extreme(own.slope for own in measured) for extreme in (min, max))
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
    return f"of {len(measured)} methods {counts}: slopes {low:+.2f} to {high:+.2f}"


OPENING = """\
`make study` trains {networks} networks on scikit-learn's digits ({train} to train on, the other 1197 held out) in
{minutes} minutes on {machine} (torch {torch}, {date}). A whole grid of learning rate × weight decay is one batched
model, each configuration a param group, each step of all of them one launch. It can be interrupted, and goes on where
it was. There are two networks of 64 hidden units, trained in batches of {batch}, {steps} steps an epoch. In the
*normalised* one every layer is normalised over the batch, so that no weight's scale matters, as under Batch Norm. The
*noisy* one has no normalisation, and {noise:.0%} of its training labels are drawn at random, so that it has something
to gain from decay.
"""
RIDGES = """\
**How the best λ moves with the learning rate** is not the optimizer's affair alone. Where no weight's scale matters,
*c* times the learning rate is the *same* training of larger weights if λ is multiplied by a power of *c*: −1 for SGD-L2
and AdamW `lr_scaled`, 0 for the decoupled forms, as the paper saw on networks with Batch Norm, and −2 for Adam-L2 and
the metric-proximal form. Where scale matters and training comes to rest, a penalty rests at the same place whatever the
learning rate (0), and the λ of a decoupled form has to follow it (+1). `tests/test_propositions.py` shows the powers to
the last digits, and where SGD rests. The slope measured is that of a line through the best λ of every learning rate,
cosine schedule, with a 95% interval (bootstrap over learning rates and seeds); *nearly* is within 0.5.
"""
BETWEEN = """\
On the normalised network slopes lie below the derived ones: the symmetry scales the initial weights too, while the runs
all begin at the same ones. Claim by claim (*not to be told*: the difference over {finals} new seeds is within its 95%
interval):
"""


PICTURES = {
    "ridges_normalised": "Error over learning rate and weight decay, normalised network",
    "ridges_noisy": "The same, network without normalisation and noisy labels",
    "schedules": "Adam-L2 and AdamW under three schedules",
    "budgets": "The best weight decay against the training budget",
    "anytime": "Anytime performance of AdamWR, AdamW and Adam-L2",
}


def section(found: Findings) -> str:
    """The README's section."""
    minutes, noise = f"{found.about['seconds'] / 60:.0f}", NOISE["noisy"]
    opening = OPENING.format(
        **found.about, minutes=minutes, train=TRAIN, batch=BATCH, steps=STEPS_AN_EPOCH, noise=noise
    )
    parts = [
        filled(*opening.split()),
        filled(*RIDGES.split()),
        markdown(ridges(found)),
        filled(*BETWEEN.format(finals=found.plan.finals).split()),
        markdown(claims(found)),
        *(f"![{title}](bench/results/study_{name}.png)" for name, title in PICTURES.items()),
        "All numbers are in [bench/results](bench/results/study.txt). To train again, and to keep what comes:",
        "    make study\n    .venv/bin/python bench/study --save --readme",
    ]
    return "\n\n".join(parts)
