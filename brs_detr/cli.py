"""`brs-detr COMMAND`: one table of commands, each with its arguments and a module that runs it.

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
from collections.abc import Callable, Sequence
from typing import NamedTuple

from brs_detr.commands import arguments, evaluate, train
from brs_detr.commands.arguments import is_setting
from brs_detr.config import option_as_setting
from brs_detr.config_io import ConfigError
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.user_files import complain, end_output, forgive_output


class Command(NamedTuple):
    """A command of the program.

    Attributes:
        module: has `run(options)`; imported only once the words of the command line are known to be right.
        text: one line for the help.
        add_arguments: called with its parser.
        check: called with the options; raises if they cannot be used.
        description: of its help; None: the text.
    """

    module: str
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None] | None = None
    description: str | None = None


COMMANDS = {
    "train": Command(
        "brs_detr.commands.train",
        "train a detector as a recipe says",
        train.add_arguments,
        description=train.DESCRIPTION,
    ),
    "eval": Command(
        "brs_detr.commands.evaluate",
        "evaluate trained weights",
        evaluate.add_arguments,
        description=evaluate.DESCRIPTION,
    ),
    "predict": Command(
        "brs_detr.commands.predict",
        "find objects in images, videos and cameras",
        arguments.predict,
        arguments.check_predict,
    ),
    "info": Command(
        "brs_detr.commands.info",
        "what a recipe builds and where it would run",
        arguments.info,
        arguments.check_info,
    ),
    "check-data": Command(
        "brs_detr.commands.check_data",
        "find every fault of a dataset before training does",
        arguments.check_data,
        arguments.check_dataset,
    ),
    "make-dataset": Command(
        "brs_detr.data.synthetic", "draw a small dataset of shapes in COCO's format", arguments.make_dataset
    ),
    "convert-dataset": Command(
        "brs_detr.commands.convert_dataset",
        "turn a Pascal VOC, YOLO or Cityscapes folder into COCO jsons, or split a json",
        arguments.convert_dataset,
    ),
    "export": Command(
        "brs_detr.commands.export",
        "write a detector as an ONNX or torch.export file and check it",
        arguments.export,
        arguments.check_weights,
    ),
    "benchmark": Command(
        "brs_detr.commands.benchmark",
        "time a detector or an exported file, and count its parameters and operations",
        arguments.benchmark,
        arguments.check_benchmark,
    ),
    "push": Command(
        "brs_detr.commands.push",
        "upload a run to the Hugging Face hub, with a model card",
        arguments.push,
        arguments.check_push,
    ),
    "replay": Command(
        "brs_detr.commands.replay",
        "run a batch again that a training saved because something was not finite",
        arguments.replay,
    ),
    "convert": Command(
        "brs_detr.commands.convert_checkpoint",
        "turn an official Co-DETR, Co-DINO or BRS-DETR checkpoint into a weights file",
        arguments.convert,
    ),
}
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Raises:
        SystemExit: after the help, or where the command line is wrong (code 2).
    """
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:], prog=f"brs-detr {words[0]}")
    parser = argparse.ArgumentParser(
        prog="brs-detr",
        description="BRS-DETR: train, evaluate and use a detector. `brs-detr COMMAND --help` has the arguments of one.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.text)
    word = next((word for word in words if not word.startswith("-")), None)
    if word is not None and word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"{word}: no such command; {hint}The commands are {', '.join(COMMANDS)}.")
    parser.parse_args(words)
    assert word is not None  # without a command, parse_args has exited
    parser.error(f"options come after the command: brs-detr {word} {' '.join(words[: words.index(word)])}")


def run_command(name: str, words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command with its own arguments; returns the exit code.

    Args:
        name: key of COMMANDS.
        words: the command line without the command's name; None: that of this process, a script.
        prog: what the help calls it; None: the script.

    Raises:
        SystemExit: after the help, or where the command line is wrong (code 2).
    """
    command = COMMANDS[name]
    forgive_output()
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.description or command.text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    options = parse(parser, sys.argv[1:] if words is None else list(words))
    try:
        if command.check is not None:
            command.check(options)
        module = importlib.import_module(command.module)
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
