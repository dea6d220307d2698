"""What Python functions start with: brings in the client of the Runtime API, then the function.

Everything that the client imports is imported while the function's folders are not yet looked in. So a file of the
function that is named as a module of the client or of the standard library (`types.py`, `token.py`, `awslambdaric/`)
can't take that module's place. Nothing else is imported: each module is time of every cold start.

Its path and `main` are where wrappers (AWS_LAMBDA_EXEC_WRAPPER) know them from AWS Lambda.
"""

import os
import site
import sys

# This file's folder, with the client and what else functions find without bringing it (LAMBDA_RUNTIME_DIR).
HERE = os.path.dirname(__file__)
# Without what PYTHONPATH names.
OWN = [HERE, *(folder for folder in sys.path if folder.startswith(sys.base_prefix + os.sep))]

GIVEN = sys.path[:]
sys.path[:] = OWN
from awslambdaric import bootstrap
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

sys.path[:] = GIVEN


class Client(LambdaRuntimeClient):
    """The client, which imports `http.client` only to tell of an init that failed."""

    def post_init_error(self, *args, **kwargs):
        # The process ends after it: the function needs its path no more.
        sys.path[:] = OWN
        super().post_init_error(*args, **kwargs)


def extend_path():
    """Has modules looked for where AWS Lambda does: in the function, in layers, then where Python does by itself.

    One who sets PYTHONPATH names the folders of layers in it, too.
    """
    folders = [os.environ["LAMBDA_TASK_ROOT"]]
    if "PYTHONPATH" not in os.environ:
        folders += ["/opt/python/lib/python{}.{}/site-packages".format(*sys.version_info), "/opt/python"]
        # For Python programs that the function runs.
        os.environ["PYTHONPATH"] = HERE
    sys.path[:0] = folders
    # Site directories: what their .pth files name is looked in last.
    known = set(sys.path)
    for folder in folders:
        site.addsitedir(folder, known)


def main():
    """Runs the function until the process is killed."""
    extend_path()
    bootstrap.run(os.environ["_HANDLER"], Client(os.environ["AWS_LAMBDA_RUNTIME_API"]))


if __name__ == "__main__":
    main()
