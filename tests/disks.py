"""File systems of a few megabytes, to be filled. Only root can mount them; CI has to be able to."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def disk(target, kind, size):
    """Mount a new file system of `size` bytes at `target`: "tmpfs", "ramfs" (which has no limit), or "ext4"."""
    target.mkdir(exist_ok=True)
    if kind == "ext4":
        image = target.with_suffix(".img")
        image.write_bytes(b"")
        os.truncate(image, size)
        _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        _run("mount", "-o", "loop", str(image), str(target))
        (target / "lost+found").rmdir()
    else:
        _run("mount", "-t", kind, *(["-o", f"size={size}"] if kind == "tmpfs" else []), kind, str(target))
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def _run(*command):
    """Run it; skip where that cannot be done here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as e:
        problem = str(e)
    if problem:
        reason = f"{' '.join(command)}: {problem}"
        if os.environ.get("CI") == "true" and "loop" not in command and command[0] != "mkfs.ext4":
            pytest.fail(reason)  # there a tmpfs can be mounted; a container may have no loop device
        pytest.skip(reason)
