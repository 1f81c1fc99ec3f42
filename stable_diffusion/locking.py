"""Hidden folders with a lock, for files that are not ready: a killed process has no lock.

The lock is one of the system (`flock`), which ends with its process. A process number would not
tell: other containers and computers have other processes. Where the system has no locks, such as on
Windows, nothing is locked, and what a killed process left beside a single file stays there.
"""

import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from stable_diffusion.files import HIDDEN, RECORD, STAGED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock"  # the file that is locked
PREFIX = ".stable-diffusion-"
TEMPORARY = re.compile(re.escape(PREFIX) + "[0-9a-f]{8}")  # hidden folder beside a single file


@contextmanager
def hold_folder(folder):
    """Yields the locked hidden subfolder of a folder, which is made if it does not exist."""
    made, hidden = not folder.exists(), folder / HIDDEN
    if made:
        os.mkdir(folder)
    try:
        lock = take_lock(hidden)
        if lock is None:
            raise ValueError(f"{folder} is being saved to by another process.")
        try:
            yield hidden
        finally:
            try:
                if not (hidden / RECORD).exists():
                    shutil.rmtree(hidden / STAGED, ignore_errors=True)
            finally:
                drop_lock(lock, hidden)
    finally:
        if made:
            try_to(os.rmdir, folder)  # only if it is still empty


@contextmanager
def make_temporary(parent):
    """Yields a new locked hidden folder, and removes it, and those that killed calls left."""
    remove_leftovers(parent)
    lock = None
    while lock is None:
        folder = parent / f"{PREFIX}{secrets.token_hex(4)}"
        lock = take_lock(folder)
    try:
        yield folder
    finally:
        try:
            try_to(os.unlink, folder / STAGED)
        finally:
            drop_lock(lock, folder)


def remove_leftovers(parent):
    """Removes hidden folders that killed calls of `make_temporary` left in a folder."""
    try:
        entries = list(os.scandir(parent))
    except OSError:  # such as a folder that files can be written to, but not listed
        return
    for entry in entries:
        if TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):
                folder, names = Path(entry.path), set(os.listdir(entry.path))
                if not names:
                    os.rmdir(folder)
                elif LOCK in names and names <= {LOCK, STAGED}:
                    file = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                    if _lock_file(file):
                        try_to(os.unlink, folder / STAGED)
                        drop_lock(file, folder)
                    else:
                        os.close(file)


def take_lock(folder):
    """Makes a hidden folder and locks it; returns the open lock, or None if another process has it.

    Another process may remove the folder while it is empty, and removes the file of a lock that it
    drops. So what was made or locked here may be gone or another one by now; then it is tried
    again.
    """
    lock = folder / LOCK
    while True:
        with suppress(FileExistsError):
            os.mkdir(folder)
        try:
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise ValueError(f"{folder} must be a folder that this package made.")
            file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:
            continue
        except OSError:
            try_to(os.rmdir, folder)
            raise
        if _lock_file(file) is False:
            os.close(file)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.lstat(lock)):
                return file
        os.close(file)


def _lock_file(file):
    """Locks an open file. Returns whether it is locked now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return None
    return True


def drop_lock(file, folder):
    """Removes the file of a lock, and the hidden folder if it is empty then."""
    if fcntl is None:  # Windows removes no open file
        os.close(file)
        try_to(os.unlink, folder / LOCK)
    else:
        try:
            try_to(os.unlink, folder / LOCK)
        finally:
            os.close(file)
    try_to(os.rmdir, folder)


def try_to(remove, path):
    """Calls a function that removes a file or folder, and ignores errors of the system."""
    with suppress(OSError):
        remove(path)
