"""`python -m brs_detr COMMAND`: one table of commands, each a module with `add_arguments(parser)` and `run(arguments)`.

Training and evaluation are scripts of their own (`train.py`, `eval.py`), since `accelerate launch` starts scripts.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys

from brs_detr.config_io import ConfigError
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.user_files import forgive_output, printable

COMMANDS = {
    "info": ("brs_detr.commands.info", "what a recipe builds and where it would run"),
    "predict": ("brs_detr.commands.predict", "find objects in a folder of images"),
    "export": ("brs_detr.commands.export", "write a detector as an ONNX file and check it in onnxruntime"),
    "make-dataset": ("brs_detr.data.synthetic", "draw a small dataset of shapes in COCO's format"),
    "check-data": ("brs_detr.commands.check_data", "find every fault of a dataset before training does"),
    "convert-dataset": ("brs_detr.commands.convert_dataset", "turn a Pascal VOC or YOLO folder into COCO jsons"),
    "replay": ("brs_detr.commands.replay", "run a batch again that a training saved because something was not finite"),
    "convert": (
        "brs_detr.commands.convert_checkpoint",
        "turn an official Co-DETR or BRS-DETR checkpoint into a weights file",
    ),
}
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    forgive_output()
    parser = argparse.ArgumentParser(
        prog="python -m brs_detr", description="BRS-DETR: commands around train.py and eval.py"
    )
    chosen = next((word for word in arguments if word in COMMANDS), None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # only what is asked for is imported, so that help is quick
            importlib.import_module(module).add_arguments(command)
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or not all(is_setting(word) for word in rest):
        options = parser.parse_args(arguments)  # ends with what is wrong
    elif rest:  # argparse takes settings in one place only, people write them after options too
        options.overrides = [*options.overrides, *rest]
    try:
        return importlib.import_module(COMMANDS[options.command][0]).run(options) or 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interruption as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.code
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        fault = isinstance(error, OSError) and error.errno in _DISK_FAULTS
        if not (fault or _is_for_the_user(error)):
            raise
        print(f"error: {printable(_sentence(error))}", file=sys.stderr)
        return ExitCode.STORAGE if fault else ExitCode.REFUSED


def is_setting(word: str) -> bool:
    """Is a word of the command line of the form section.setting=value."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None


def _is_for_the_user(error: Exception) -> bool:
    """Is this one of our own errors or a path that cannot be used, rather than a fault of the program?"""
    return type(error).__module__.startswith("brs_detr.") or isinstance(error, _PATH_ERRORS)


def _sentence(error: Exception) -> str:
    """The error's own words; those of the operating system without its number."""
    if isinstance(error, OSError) and error.filename is None and type(error) is OSError:  # while a file was written
        return f"what was asked for cannot be written: {error.strerror}. Make room, then run the same command again."
    named = isinstance(error, OSError) and error.filename is not None and error.strerror
    return f"{error.filename}: {error.strerror}" if named else str(error)


if __name__ == "__main__":
    sys.exit(main())
