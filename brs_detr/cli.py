"""`brs-detr COMMAND`: one table of commands, each a module with `add_arguments(parser)` and `run(options)`.

`train.py` and `eval.py` are the commands `train` and `eval` as scripts, since `accelerate launch` starts scripts and
modules. Nothing heavy is imported before the words of the command line are known to be right.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence

from brs_detr.config import option_as_setting
from brs_detr.config_io import ConfigError
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.user_files import complain, end_output, forgive_output

COMMANDS = {
    "train": ("brs_detr.commands.train", "train a detector as a recipe says"),
    "eval": ("brs_detr.commands.evaluate", "evaluate trained weights"),
    "predict": ("brs_detr.commands.predict", "find objects in a folder of images"),
    "info": ("brs_detr.commands.info", "what a recipe builds and where it would run"),
    "check-data": ("brs_detr.commands.check_data", "find every fault of a dataset before training does"),
    "make-dataset": ("brs_detr.data.synthetic", "draw a small dataset of shapes in COCO's format"),
    "convert-dataset": ("brs_detr.commands.convert_dataset", "turn a Pascal VOC or YOLO folder into COCO jsons"),
    "export": ("brs_detr.commands.export", "write a detector as an ONNX file and check it in onnxruntime"),
    "replay": ("brs_detr.commands.replay", "run a batch again that a training saved because something was not finite"),
    "convert": (
        "brs_detr.commands.convert_checkpoint",
        "turn an official Co-DETR or BRS-DETR checkpoint into a weights file",
    ),
}
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Raises:
        SystemExit: after the help, or where the command line is wrong (code 2).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], prog=f"brs-detr {arguments[0]}")
    parser = argparse.ArgumentParser(
        prog="brs-detr",
        description="BRS-DETR: train, evaluate and use a detector. `brs-detr COMMAND --help` has the arguments of one.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None and word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"{word}: no such command; {hint}The commands are {', '.join(COMMANDS)}.")
    parser.parse_args(arguments)
    assert word is not None  # without a command, parse_args has exited
    parser.error(f"options come after the command: brs-detr {word} {' '.join(arguments[: arguments.index(word)])}")


def run_command(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command with its own arguments; returns the exit code.

    Args:
        name: key of COMMANDS.
        arguments: without the command's name; None: those of this process, a script.
        prog: what the help calls it; None: the script.

    Raises:
        SystemExit: after the help, or where the command line is wrong (code 2).
    """
    module_name, description = COMMANDS[name]
    module = importlib.import_module(module_name)
    forgive_output()
    parser = argparse.ArgumentParser(
        prog=prog,
        description=getattr(module, "DESCRIPTION", description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    options = parse(parser, sys.argv[1:] if arguments is None else list(arguments))
    try:
        return end_output(module.run(options) or ExitCode.OK)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Interruption as error:
        complain(error)
        return error.code
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        fault = isinstance(error, OSError) and error.errno in _DISK_FAULTS
        if not (fault or _is_for_the_user(error)):
            raise
        complain(_sentence(error))
        return ExitCode.STORAGE if fault else ExitCode.REFUSED


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the words of a command; where it has `overrides`, settings may stand anywhere after its other arguments.

    A setting written as an option, `--data.root=x` or `--data.root x`, is taken where its name is complete.

    Raises:
        SystemExit: a word that fits nothing; the message says what was probably meant.
    """
    options, rest = parser.parse_known_intermixed_args(list(arguments))
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        takes_settings = hasattr(options, "overrides")
        options, rest = parser.parse_known_intermixed_args(_rewrite(parser, arguments, unknown, takes_settings))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def is_setting(word: str) -> bool:
    """Check whether a word of the command line has the form section.setting=value."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None


def _rewrite(
    parser: argparse.ArgumentParser, arguments: list[str], unknown: list[str], takes_settings: bool
) -> list[str]:
    """Rewrite each unknown option that is the name of a setting as a setting; refuse the others."""
    words, result = list(arguments), []
    while words:
        word = words.pop(0)
        if word not in unknown:
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals and words and not re.match(r"-+[A-Za-z]", words[0]) and not is_setting(words[0]):
            value = words.pop(0)
        near = difflib.get_close_matches(name.replace("_", "-"), _options_of(parser), n=1, cutoff=0.85)
        if near:
            parser.error(f"{name}: no such option; did you mean {near[0]}?")
        if not takes_settings:
            parser.error(f"{name}: no such option; the options are {', '.join(_options_of(parser)) or 'none'}")
        try:
            result.append(option_as_setting(name, value))
        except ConfigError as error:
            parser.error(str(error))
    return result


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """List the options that the help shows."""
    return sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_usage())))


def _is_for_the_user(error: Exception) -> bool:
    """Check whether this is one of our own errors or a path that cannot be used, rather than a bug."""
    return type(error).__module__.startswith("brs_detr.") or isinstance(error, _PATH_ERRORS)


def _sentence(error: Exception) -> str:
    """Return the message of an error; that of the operating system without its number."""
    if not isinstance(error, OSError):
        return str(error)
    if error.filename is None and type(error) is OSError:  # while a file was written
        return f"what was asked for cannot be written: {error.strerror}. Make room, then run the same command again."
    return f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)


if __name__ == "__main__":
    sys.exit(main())
