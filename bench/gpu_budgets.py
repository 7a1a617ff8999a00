"""What a GPU's report is judged by: bandwidth, torch's fused optimizer, launches."""

from __future__ import annotations

from figures import Report, of_gpu, results
from peers import CUDA, FUSED, OURS
from workloads import CEILING, MANY, TARGETS


def judge(target: str, where: str, found: float | None, least: float, form: str) -> tuple[str, str, str, str]:
    if found is None:
        return target, where, "-", "not measured"
    return target, where, form.format(found), "reached" if found >= least else "not reached"


def verdicts(report: Report) -> list[tuple[str, str, str, str]]:
    """(target, where, what was found, verdict) of every budget. A rehearsal reaches nothing: nothing is measured."""
    measured = of_gpu(report) and not report.get("rehearsal")
    cases = results(report) if measured else {}
    rows = []
    for name in (OURS, CUDA):
        for case, least in TARGETS.items():
            them = cases.get(case, {})
            found = them[name, 1].share(them.get((CEILING, 1))) if (name, 1) in them else None
            where = case if name == OURS else f"{case}, CUDA"
            rows.append(judge(f">= {least}% of copy bandwidth", where, found, least, "{:.1f}%"))
    pairs = {
        case + (f", {groups} groups" if groups > 1 else ""): (own, them[FUSED, groups])
        for case, them in cases.items()
        for (name, groups), own in them.items()
        if name == OURS and (FUSED, groups) in them
    }
    left_out = sum("all" in who for who in report.get("left_out", {}).values())
    walls = {where: own.ratio(fused) for where, (own, fused) in pairs.items()}
    devices = {where: own.device_ratio(fused) for where, (own, fused) in pairs.items()}
    for what, ratios in (("device time", devices), ("wall clock", walls)):
        worst = min(ratios, key=lambda where: ratios[where], default="")
        where = f"worst of {len(ratios)}: {worst}" if worst else "all cases"
        where += f" ({left_out} cases not measured)" if worst and left_out else ""
        rows.append(judge(f">= 1.0x {FUSED}, {what}", where, ratios.get(worst), 1.0, "{:.2f}x"))
    for case in MANY:
        rows.append(judge(f">= 6x {FUSED}, wall clock", case, walls.get(case), 6.0, "{:.2f}x"))
    launches = report.get("launches", {}) if measured else {}
    if launches.get("step_kernels") is None:
        return [*rows, judge("one launch a bucket", "profiler", None, 0, "")]
    kernels, count = launches["step_kernels"], launches["buckets"]
    where = f"profiler, {launches['tensors']} tensors, {count} buckets"
    verdict = "reached" if kernels == count else "not reached"
    return [*rows, ("one launch a bucket", where, f"{kernels} kernels", verdict)]
