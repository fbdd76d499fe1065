#!/usr/bin/env python3
"""Counts test cases over all programs that ctest ran and prints `N passed, N failed, N skipped`.

Usage: count_tests.py RESULTS

RESULTS holds ctest.xml (ctest --output-junit) and one NAME.xml for each GoogleTest program NAME. An entry
of ctest without such a file counts as one case; a program that failed without a failed case (a crash, a
time-out, a leak) counts as one failure more. The exit code is 1 if anything failed or nothing ran.
"""
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def count_gtest(path: pathlib.Path) -> dict[str, int]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None:
            counts["failed"] += 1
        elif case.get("result") == "skipped" or case.get("status") == "notrun":
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def main() -> None:
    results = pathlib.Path(sys.argv[1])
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for entry in ElementTree.parse(results / "ctest.xml").getroot().iter("testcase"):
        outcome = {"run": "passed", "fail": "failed"}.get(entry.get("status", ""), "skipped")
        report = results / f"{entry.get('name')}.xml"
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        if report.exists():
            try:
                counts = count_gtest(report)
            except ElementTree.ParseError:
                outcome = "failed"  # the program died while it wrote its report
            if outcome == "failed" and counts["failed"] == 0:
                counts["failed"] = 1
        else:
            counts[outcome] = 1
        for key, value in counts.items():
            total[key] += value
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    sys.exit(1 if total["failed"] > 0 or total["passed"] == 0 else 0)


if __name__ == "__main__":
    main()
