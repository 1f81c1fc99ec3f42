"""Runs functions in child processes, which may hang, fill the memory or be killed.

A server process has imported Keras with its NumPy backend, and another one with TensorFlow, which
can train. A server computes nothing and so has no threads. It can be forked at any time: a child is
ready at once, and costs nothing when it dies. The functions are those of `kinds` and `writing` on
NumPy, and of `runs` on TensorFlow.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
BACKEND = os.environ.get("FAULTS_BACKEND", "numpy")
PRELOADED = {"tensorflow": ["runs"]}  # modules of a server; of others `kinds` and `writing`
HERE = Path(__file__).parent
WATCHED = ("open", "os.", "shutil.")  # beginnings of names of Python's audit events
SECONDS = 300  # of wall time, after which a child counts as hanging; a case may compute for 20
MEMORY = 4 << 30  # bytes of address space that a child gets in addition to what it has


class ChildDiedError(Exception):
    """A child process did not answer: `status` is that of `Process.exitcode`, None if it hung."""

    def __init__(self, status):
        super().__init__("it hangs" if status is None else f"it died with status {status}")
        self.status = status


servers = {}  # by backend


def start_server(backend):
    """Starts the server of a backend, unless it runs already; children now come from it."""
    if backend not in servers:
        servers[backend] = forkserver.ForkServer()
        servers[backend].set_forkserver_preload(PRELOADED.get(backend, ["kinds", "writing"]))
        before = dict(os.environ)
        paths = [HERE, HERE.parent, HERE.parents[1]]
        os.environ.update(
            KERAS_BACKEND=backend,
            PYTHONPATH=os.pathsep.join(map(str, paths)),
            OMP_NUM_THREADS="1",
            OPENBLAS_NUM_THREADS="1",
            TF_NUM_INTEROP_THREADS="1",
            TF_NUM_INTRAOP_THREADS="1",  # so that sums have one order
        )
        try:
            servers[backend].ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    forkserver.connect_to_new_process = servers[backend].connect_to_new_process


class Child:
    """A child process that answers one call after the other.

    Args:
        answer: function of the arguments of a call, of a module that children can import.
        backend: Keras' backend in the child.
    """

    def __init__(self, answer, backend=BACKEND):
        start_server(backend)
        self.connection, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(other, answer), daemon=True)
        self.process.start()
        other.close()

    def send(self, *arguments):
        """Begins a call."""
        self.connection.send(arguments)

    def receive(self, seconds=SECONDS):
        """Returns the result of the call.

        Raises:
            ChildDiedError: the child died, or did not answer in time and was killed.
        """
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise ChildDiedError(self.process.exitcode) from None
        self.kill()
        raise ChildDiedError(None)

    def call(self, *arguments, seconds=SECONDS):
        self.send(*arguments)
        return self.receive(seconds)

    def kill(self):
        """Kills the child, if it lives, and waits for its end."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def call(answer, *arguments, seconds=SECONDS, backend=BACKEND):
    """Returns the result of a function, from a child process of its own."""
    child = Child(answer, backend)
    try:
        return child.call(*arguments, seconds=seconds)
    finally:
        child.kill()


def kill_while(answer, arguments, rng, touches, seconds, backend=BACKEND):
    """Kills a child: before a random touch of a file, or after a random time.

    Args:
        answer: see `Child`. Its last argument is the number of the touch, see `count_touches`.
        arguments: its other arguments.
        rng: the `Generator`.
        touches: how often it touches files if it is not killed.
        seconds: that it takes then.
        backend: see `Child`.

    Returns:
        When it was killed, or "finished", in words.
    """
    if rng.integers(2):
        kill_at, wait = int(rng.integers(1, touches + 1)), SECONDS
    else:
        kill_at, wait = None, rng.uniform(0, seconds)
    child = Child(answer, backend)
    child.send(*arguments, kill_at)
    try:
        child.receive(wait)
        return "finished"
    except ChildDiedError as error:
        assert error.status in (-signal.SIGKILL, None), error
        return f"killed at {kill_at or f'{wait:.3f} s'}"
    finally:
        child.kill()


@contextlib.contextmanager
def count_touches(folder, kill_at=None):
    """Yields a list that gets an entry for each touch of a file in a folder, until the block ends.

    Args:
        folder: path.
        kill_at: number of the touch before which this process is killed, or None.
    """
    touches, counting = [], True

    def count(event, arguments):
        if counting and event.startswith(WATCHED) and str(folder) in str(arguments):
            touches.append(event)
            if len(touches) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        yield touches
    finally:
        counting = False


def _serve(connection, answer):
    """Runs in the child: answers calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(answer(*arguments))
