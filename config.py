"""Command lines: a dataclass is the config, its fields are the flags. Imports nothing heavy, so that `--help` answers at once.

A field is declared with `flag(default, help, group)`. Bad input anywhere ends in one line and exit status 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from pathlib import Path


def flag(default, help, group, choices=None, unit=""):
    """A config field: `help` says what it is, `unit` what it counts. A tuple default means that the flag may be repeated."""
    meta = {"help": help + (f" [{unit}]" if unit else ""), "group": group, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


def read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.5)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def unknown(what, name, known):
    """The error that names the nearest known value."""
    near = difflib.get_close_matches(name, known, 1, 0.4)
    return ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else ""))


def one_of(choices):
    """A type for argparse: one of the choices."""
    def parse(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(unknown("value", text, choices))
        return text
    return parse


def given(name):
    """Whether the command line has the flag of a field, be it with its default."""
    return any(word.partition("=")[0] == "--" + name.replace("_", "-") for word in sys.argv)


def parse_config(cls, argv=None, description="", only=None):
    """A `cls` (dataclass) filled from the command line; `--batch-size` for `batch_size`, `--no-qk-norm` for a field that is True. `only`: the fields that are flags, if not all."""
    parser = Parser(prog=Path(sys.argv[0]).name, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in (field for field in dataclasses.fields(cls) if only is None or field.name in only):
        name, meta, default = "--" + field.name.replace("_", "-"), field.metadata, field.default
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        help = meta["help"].replace("%", "%%") + (f" (default: {default})" if default not in (None, "", ()) else "")
        if isinstance(default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)
        elif isinstance(default, tuple):
            group.add_argument(name, action="append", default=[], metavar=field.name.upper(), help=help + " (repeatable)")
        else:
            kind = one_of(meta["choices"]) if meta["choices"] else number(field.type)
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else field.name.upper()
            group.add_argument(name, type=kind, default=default, metavar=metavar, help=help)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()})


def number(kind):
    """int or float, finite; any other type as it stands."""
    if kind not in (int, float):
        return str
    def parse(text):
        value = kind(text)
        if value != value or abs(value) == float("inf"):
            raise ValueError
        return value
    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def check_least(cfg, **least):
    """Refuses settings below their least values."""
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; the least is {value}")


def subcommand(commands, description):
    """The first word of the command line, one of `commands`; where there is none, or --help, the description is printed and the program ends."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(f"{description}\n`python {Path(sys.argv[0]).name} COMMAND --help` lists the flags.")
        sys.exit(0)
    if command not in commands:
        raise unknown("command", command, commands)
    return command


@contextlib.contextmanager
def going_on(how):
    """Ctrl-C meanwhile ends the program with how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None


def one_line_errors(main):
    """Run `main`; bad input (ValueError, OSError, an absent package, too much for the memory) ends in one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError) as error:
        defect = isinstance(error, RuntimeError) and "memory" not in str(error)         # torch's allocators raise RuntimeErrors
        if defect or os.environ.get("NANOSD3_TRACEBACK"):  # for developers
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("; ".join([f"\n{Path(sys.argv[0]).name}: stopped", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)
