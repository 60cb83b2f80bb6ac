"""Say in one line, before pip does in thirty, where MLX and mlx-lm cannot be installed.

The Makefile runs this by itself, with whatever Python there is, so it is written for any.
"""

import platform
import sys


def unsupported_reason(python, system, machine, release):
    """The reason why MLX cannot be installed, "" where it can.

    `release` is the version of macOS, or under Linux of glibc, as numbers; () without glibc.
    """
    version = ".".join(map(str, release))
    if not (3, 11) <= python[:2] <= (3, 14):
        this = "Python 3.11 to 3.14 is needed, and this is {}.{}".format(*python)
        return this + "; make PYTHON=python3.12 picks another"
    if system == "Darwin" and machine != "arm64":
        return "Apple silicon is needed, and a Python for it; this one is for " + machine
    if system == "Darwin" and release < (14,):
        return "macOS 14 or newer is needed, and this is " + version
    if system == "Linux" and release < (2, 35):
        return "glibc 2.35 or newer is needed, and this Linux has " + (version or "another libc")
    return ""


if __name__ == "__main__":
    version = platform.mac_ver()[0] or platform.libc_ver()[1]
    release = tuple(int(number) for number in version.split(".") if number.isdigit())
    why = unsupported_reason(sys.version_info, platform.system(), platform.machine(), release)
    sys.exit("error: " + why if why else 0)
