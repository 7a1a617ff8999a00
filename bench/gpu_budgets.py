"""What a GPU's report is judged by: bandwidth, torch's fused optimizer, launches."""

from __future__ import annotations

from figures import Report, of_gpu, results, share
from peers import CUDA, FUSED, OURS
from workloads import CEILING, MANY, TARGETS

REACHED, MISSED, UNKNOWN = "reached", "not reached", "not measured"


def judge(target: str, where: str, found: float | None, least: float, form: str) -> tuple[str, str, str, str]:
    if found is None:
        return target, where, "-", UNKNOWN
    return target, where, form.format(found), REACHED if found >= least else MISSED


def verdicts(report: Report) -> list[tuple[str, str, str, str]]:
    """(target, where, what was found, verdict) of every budget. A rehearsal reaches nothing: nothing is measured."""
    measured = of_gpu(report) and not report.get("rehearsal")
    cases = results(report) if measured else {}
    result = []
    for name in (OURS, CUDA):
        for case, least in TARGETS.items():
            them = cases.get(case, {})
            found = share(them[name, 1], them.get((CEILING, 1))) if (name, 1) in them else None
            where = case if name == OURS else f"{case}, CUDA"
            result.append(judge(f">= {least}% of copy bandwidth", where, found, least, "{:.1f}%"))
    pairs = {
        (case, groups): (own, them[FUSED, groups])
        for case, them in cases.items()
        for (name, groups), own in them.items()
        if name == OURS and (FUSED, groups) in them
    }
    left_out = sum("all" in who for who in report.get("left_out", {}).values())
    walls = {key: own.ratio(fused) for key, (own, fused) in pairs.items()}
    devices = {key: own.device_ratio(fused) for key, (own, fused) in pairs.items()}
    for what, ratios in (("device time", devices), ("wall clock", walls)):
        worst = min(ratios, key=lambda key: ratios[key], default=None)
        where = "all cases"
        if worst:
            where = f"worst of {len(ratios)}: {worst[0]}" + (f", {worst[1]} groups" if worst[1] > 1 else "")
            where += f" ({left_out} cases not measured)" if left_out else ""
        result.append(judge(f">= 1.0x {FUSED}, {what}", where, ratios[worst] if worst else None, 1.0, "{:.2f}x"))
    for case in MANY:
        result.append(judge(f">= 6x {FUSED}, wall clock", case, walls.get((case, 1)), 6.0, "{:.2f}x"))
    launches = report.get("launches", {}) if measured else {}
    kernels, buckets = launches.get("step_kernels"), launches.get("buckets")
    if kernels is None or buckets is None:
        return [*result, ("one launch a bucket", "profiler", "-", UNKNOWN)]
    where = f"profiler, {launches['tensors']} tensors, {buckets} buckets"
    verdict = REACHED if kernels == buckets else MISSED
    return [*result, ("one launch a bucket", where, f"{kernels} kernels", verdict)]
