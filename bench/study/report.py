"""What the study found, in words and numbers: the text that is kept, and the section of docs/study.md."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from internals import aligned
from report import markdown
from tables import filled

from .findings import Findings, Mean
from .plan import BUDGET_LR, GROWTHS, LAWS, METHODS, PLAIN, RIVALS, SCHEDULES, VARIANTS
from .train import BATCH, NOISE, STEPS_AN_EPOCH, TRAIN

Rows = list[tuple[str, ...]]
BY_LAYER = "by layer"
VARIED = "Cautious and corrected decay beside the plain one, each at its best, with new seeds: test error"
GROWN = "Best weight decay as data or width grow: exponents, and those that each law says"


def signed(slope: int) -> str:
    """A whole slope, as it is printed."""
    return f"{slope:+d}" if slope else "0"


def tables(found: Findings) -> dict[str, Rows]:
    """By title.

    (a) slopes and best errors, (b) what was best under each schedule, (c) budgets, (d) ends of periods, (e) growth, (f)
    variants.
    """
    ends = found.plan.period_ends()
    of_slopes = ("slope (95%)", "derived", "seen?", "paper's reading", "seen?")
    ridges: Rows = [("network", "method", "lowest error, %", *of_slopes)]
    schedules: Rows = [("network", "schedule", *(f"{name}, %" for name in RIVALS), "difference, %", "95%")]
    budgets: Rows = [("network", "lr", "exponent of λ (95%)", "of λ √steps", "-0.5 seen?")]
    anytime: Rows = [("network", "after epoch", *map(str, ends))]
    for k, network in enumerate(NOISE):
        for name, method in METHODS.items():
            own, lowest = found.ridge(name, network), 100 * found.table(name, network).mean(-1).min()
            expected = [text for slope in (method.slopes[k], method.claim) for text in (signed(slope), own.seen(slope))]
            ridges.append((network, name, f"{lowest:.2f}", str(own), *expected))
        for schedule in SCHEDULES:
            gap = found.gap(network, schedule)
            low, high = (100 * (gap.value + sign * 1.96 * gap.error) for sign in (-1, 1))
            errors = (str(Mean.of(found.finals[network, name, schedule])) for name in RIVALS)
            schedules.append((network, schedule, *errors, f"{100 * gap.value:+.2f}", f"{low:+.2f} to {high:+.2f}"))
        own = found.budget(network)
        normal = "none" if math.isnan(own.slope) else f"{own.slope + 0.5:+.2f}"
        budgets.append((network, f"{BUDGET_LR[network]:g}", str(own), normal, own.seen(-0.5)))
    for (network, name), values in found.anytime.items():
        anytime.append((network, name, *(str(Mean.of(values[end - 1])) for end in ends)))
    return {
        "Slope of ln(best weight decay) over ln(lr), cosine schedule": ridges,
        "Test error of what was best, with new seeds: mean ± standard error": schedules,
        "Best weight decay of AdamW independent against the number of steps": budgets,
        "Error on held-out digits at the ends of AdamWR's periods: mean ± standard error": anytime,
        GROWN: growing(found),
        "The same from size to size: λ, and its error on held-out digits, %": followed(found),
        VARIED: varied(found),
    }


def varied(found: Findings) -> Rows:
    """(f) Test errors of the plain decay and its variants, and how far these are below it."""
    rows: Rows = [("network", "decay", "lr", "λ", "error, %", "below the plain one, %", "95%", "better?")]
    for network in NOISE:
        for name, (lr, decay) in found.varied(network).items():
            error = str(Mean.of(found.variants[network, name]))
            cells = ("", "", "")
            if name in VARIANTS:
                gain = found.gained(network, name)
                low, high = (100 * (gain.value + sign * 1.96 * gain.error) for sign in (-1, 1))
                verdict = "not to be told" if low <= 0 <= high else "yes" if low > 0 else "no, worse"
                cells = (f"{100 * gain.value:+.2f}", f"{low:+.2f} to {high:+.2f}", verdict)
            title = "plain (lr_scaled)" if name == PLAIN else name
            rows.append((network, title, f"{lr:.2g}", f"{decay:.2g}", error, *cells))
    return rows


def growing(found: Findings) -> Rows:
    """(e) How the best weight decay moves, and what each law says."""
    rows: Rows = [("network", "what grows", "method", "exponent of λ (95%)", *LAWS)]
    for network, (name, growth) in itertools.product(NOISE, GROWTHS.items()):
        own, said = found.growth(network, name), {}
        for title, law in growth.laws.items():
            exponent = math.log2(growth.predicted(law, 1e-3, 2.0) / 1e-3)
            said[title] = f"{round(exponent, 2) or 0:g}: {own.seen(exponent, 0.25)}"
        cells = (said.get(title, BY_LAYER) for title in LAWS)
        rows.append((network, name.removesuffix(", lr_scaled"), growth.method, str(own), *cells))
    return rows


def followed(found: Findings) -> Rows:
    """(e) What was best at each size, and where who follows a law from the least size comes out."""
    rows: Rows = [("network", "what grows", "method", "size", "best", *LAWS)]
    for network, (name, growth) in itertools.product(NOISE, GROWTHS.items()):
        said = {"best": found.followed(network, name, None)}
        said |= {title: found.followed(network, name, law) for title, law in growth.laws.items()}
        for k, size in enumerate(found.plan.sizes(growth)):
            at = {title: f"{decays[k][0]:.2g}: {100 * decays[k][1]:.2f}" for title, decays in said.items()}
            cells = (at.get(title, BY_LAYER) for title in ("best", *LAWS))
            rows.append((network, name.removesuffix(", lr_scaled"), growth.method, str(size), *cells))
    return rows


def render(found: Findings) -> str:
    """All tables as text."""
    about = {**found.about, **{f"{key} (added)": value for key, value in found.about.get("added", {}).items()}}
    head = ", ".join(f"{key} {value}" for key, value in about.items() if key != "added")
    return "\n\n".join([head, *(f"{title}\n\n{aligned(rows)}" for title, rows in tables(found).items())]) + "\n"


def claims(found: Findings, network: str) -> dict[str, str]:
    """What the literature says, and whether it was seen on a network."""
    seen = {}
    for text, claim in (("Coupled, the best λ falls as 1/lr", -1), ("Decoupled, the best λ does not depend on lr", 0)):
        fits = [found.ridge(name, network) for name, method in METHODS.items() if method.claim == claim]
        low, high = (extreme(own.slope for own in fits) for extreme in (min, max))
        counts = ", ".join(f"{n} {word}" for word, n in Counter(own.seen(claim) for own in fits).items())
        seen[text] = f"of {len(fits)} methods {counts}: slopes {low:+.2f} to {high:+.2f}"
    words = []
    for schedule in SCHEDULES:
        gap = found.gap(network, schedule)
        beyond = abs(gap.value) > 1.96 * gap.error
        words.append(f"{schedule}: {'not to be told' if not beyond else 'yes' if gap.value > 0 else 'no, above'}")
    seen["AdamW's best test error is below Adam-L2's"] = "; ".join(words)
    exponent = found.budget(network)
    seen["The best λ falls as 1/√steps"] = f"{exponent.seen(-0.5)}: exponent {exponent}"
    ends = found.plan.period_ends()
    means = {name: values.mean(-1) for (own, name), values in found.anytime.items() if own == network}
    wins = sum(means["AdamWR"][end - 1] <= min(own[end - 1] for own in means.values()) for end in ends)
    text = f"the lowest error of the four at the end of {wins} of its {len(ends)} periods"
    return {**seen, "AdamWR is ahead at any time": text}


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
GROWING = """\
**How the best λ moves as data and width grow**, beside what the laws of
[Which weight decay](weight-decay.md#from-one-training-to-another) say. Data: {samples} digits, for {data} epochs,
at one lr. Width: {widths} units in each of two hidden layers, for {wide} epochs, at one lr or by muP, where the lr of
all matrices but the first falls as 1/width. *Yes*: the 95% interval holds the exponent; *nearly*: it is within 0.25;
*by layer*: the laws say +1 of layers whose lr falls and 0 of the others, while one λ was tried for all. {seeds} seeds.
"""


VARYING = """\
**Cautious and corrected decay against the plain one**, AdamW `lr_scaled` under the cosine. Each was tuned on a grid of
its own, as large as the others', and what was best of each trained again with {finals} new seeds; differences are seed
by seed{added}.
"""


PICTURES = {
    "ridges_normalised": "Error over learning rate and weight decay, normalised network",
    "ridges_noisy": "The same, network without normalisation and noisy labels",
    "schedules": "Adam-L2 and AdamW under three schedules",
    "budgets": "The best weight decay against the training budget",
    "anytime": "Anytime performance of AdamWR, AdamW and Adam-L2",
    "growths": "The best weight decay as data and width grow, and what each law makes of that of the least size",
    "variants": "Cautious, corrected and plain decay, each at its best, with new seeds",
}


def section(found: Findings) -> str:
    """The section of docs/study.md."""
    trained = {"minutes": f"{found.about['seconds'] / 60:.0f}", "train": TRAIN, "noise": NOISE["noisy"]}
    opening = OPENING.format(**found.about, **trained, batch=BATCH, steps=STEPS_AN_EPOCH)
    seen = [claims(found, network) for network in NOISE]
    rows = [(claim, *(own[claim] for own in seen)) for claim in seen[0]]
    samples, widths = (f"{least} to {most}" for least, *_, most in (found.plan.samples, found.plan.widths))
    data, wide = found.plan.grown_epochs
    added = found.about.get("added")
    added = f" ({added['networks']} networks more, on {added['machine']}, {added['date']})" if added else ""
    parts = [
        filled(opening),
        filled(RIDGES),
        markdown(next(iter(tables(found).values()))),
        filled(BETWEEN.format(finals=found.plan.finals)),
        markdown([("claim", *(f"on the {network} network" for network in NOISE)), *rows]),
        filled(GROWING.format(samples=samples, data=data, widths=widths, wide=wide, seeds=3 * found.plan.seeds)),
        markdown(tables(found)[GROWN]),
        filled(VARYING.format(finals=found.plan.finals, added=added)),
        markdown(varied(found)),
        *(f"![{title}](../bench/results/study_{name}.png)" for name, title in PICTURES.items()),
        "All numbers are in [bench/results](../bench/results/study.txt). To train again, and to keep what comes:",
        "    make study\n    .venv/bin/python bench/study --save --docs",
    ]
    return "\n\n".join(parts)
