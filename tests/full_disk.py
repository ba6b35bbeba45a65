"""A disk without room: the system refuses to make any file larger."""

import contextlib
import resource


@contextlib.contextmanager
def files_up_to(num_bytes: int):
    """Let writing more of a file fail, as on a full disk: "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
