"""Which compiled kernels were executed, and how near to their budget, at the end of a run."""

from __future__ import annotations

from collections import defaultdict

PROPERTY = "compiled"  # value: [architecture, dtype, {kernel: error as a share of its budget}]


def pytest_terminal_summary(terminalreporter):
    shares = defaultdict(list)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == PROPERTY:
                arch, dtype, errors = value
                for kernel, share in errors.items():
                    shares[kernel, arch, dtype].append(share)
    if shares:
        terminalreporter.section("compiled kernels executed: cases, worst error / budget")
        for (kernel, arch, dtype), found in sorted(shares.items()):
            where = f"{kernel:14} sm_{arch} {dtype:9}"
            terminalreporter.line(f"{where} {len(found):4} cases  {max(found):.2f}")
