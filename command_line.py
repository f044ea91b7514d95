"""What all commands share: one way to declare flags, to refuse bad input, and to end."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from pathlib import Path

from atomic_write import is_writable

OUT_OF_MEMORY = "out of memory|enough memory|allocate memory|ALLOC_FAILED"  # CUDA, CPU, cuDNN and cuBLAS


class UserError(ValueError):
    """Input that cannot be used. Its text is one line that names the flag or file, the bad value and the way out.

    Only this error ends a command in one line. Any other is a fault of the program and keeps its traceback.
    """


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, but for those without one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises a UserError for flags that are wrong, and its help tells defaults."""

    def __init__(self, description):
        super().__init__(usage=argparse.SUPPRESS, description=description, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def filled_path(text):
    """The argparse type of a flag that takes a path: refuses an empty one, which would mean the folder we are in."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a shell variable not set?")
    return Path(text)


def checked(kind, within=None):
    """Return a type for argparse: a text that is not empty, or a number in an interval such as "[0, 1)"."""

    def read(text):
        value = kind(text)
        if value == "":
            raise argparse.ArgumentTypeError("is empty; is a shell variable not set?")
        if within:
            low, high = map(float, within[1:-1].split(","))
            if not low <= value <= high or value == low and "(" in within or value == high and ")" in within:
                raise argparse.ArgumentTypeError(f"{value}: does not lie in {within}")
        return value

    read.__name__ = {int: "whole number", float: "number"}.get(kind, "text")  # in argparse's own errors
    return read


def new_file(*endings):
    """Return the argparse type of a flag that names a file to write, in a folder that takes it, with one of endings."""

    def read(text):
        path = filled_path(text)
        ending = path.suffix if ".pt" in endings else path.suffix.lower()  # models are found again by *.pt
        folder, is_named_so = path.absolute().parent, not endings or ending in endings
        if path.is_dir() or not folder.is_dir() or not is_writable(folder) or not is_named_so:
            kind = f"a file that ends in {', '.join(endings)}" if endings else "a file"
            raise argparse.ArgumentTypeError(f"{path}: name {kind}, in a folder that can be written to")
        return path

    return read


class Output:
    """A text stream that drops what nobody can read any more (| head -1, a closed terminal), so no print ends a job."""

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # None where the shell closed it

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what the buffer holds goes there too, or Python would try again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_command(command, argv=None):
    """Call command(argv) and return the exit status of the script: 0, or what `command` returns.

    A UserError ends it in one line with status 2, a failed read or write, numbers that are not finite or a lack of
    memory with status 1, Ctrl-C with status 130.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a script has it so while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    script = re.sub(r".*[/\\]", "", sys.modules[command.__module__].__file__)
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            return command(argv) or 0
        except UserError as error:
            status, message = 2, str(error)
        except (OSError, FloatingPointError) as error:
            status, message = 1, str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            status, message = 1, "out of memory; use a smaller --batch-size or model, or --device cpu"
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        print(f"{script}: error: {' '.join(message.splitlines())}", file=sys.stderr)  # also of a name of two lines
    return status


def is_out_of_memory(error):
    """Whether an exception says that the CPU or GPU has too little memory; torch reports it as RuntimeError."""
    return isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None
