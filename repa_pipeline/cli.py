"""The `repa` command: a thin shell over public functions (commands.py).

Flags are made from the dataclasses of config.py, so every setting is a flag. Neither torch nor
ray is imported before a command needs it.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from repa_pipeline import __version__
from repa_pipeline.command_table import COMMAND_TABLE, COMMANDS
from repa_pipeline.config import PRESETS, CommonConfig
from repa_pipeline.errors import RepaError
from repa_pipeline.resolve import Resolved, load_project, resolve

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="repa",
    help="Train diffusion transformers with representation alignment (REPA) from a cache: "
    "encode-latents, cache-features, train, sample, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def _default_text(command: str, field: dataclasses.Field[Any]) -> str:
    """The default as help shows it, with the presets that differ from it."""
    if field.default is None or field.default is False or field.default == ():
        texts = []
    else:
        texts = [f"default: {_show(field.default)}"]
    for name, preset in PRESETS.items():
        values = {**preset.get("", {}), **preset.get(command, {})}
        if field.name in values:
            texts.append(f"{name}: {_show(values[field.name])}")
    return f"  [{'; '.join(texts)}]" if texts else ""


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parameter(command: str, field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A command-line parameter for a setting; None means "not given"."""
    help_text = field.metadata["help"] + _default_text(command, field)
    if field.metadata["choices"]:
        help_text += f"  ({', '.join(field.metadata['choices'])})"
    # A name that Python keeps for itself ends in "_": from_ is --from.
    flag = "--" + field.name.rstrip("_").replace("_", "-")
    flags, metavar, kind = [flag], None, hint
    if hint in (bool, bool | None):
        flags, kind = [f"{flag}/--no-{flag[2:]}"], bool | None
    elif typing.get_origin(hint) is tuple:
        many = typing.get_args(hint)[-1] is Ellipsis
        kind = list[str] | None if many else str | None
        metavar = "NAME" if many else "LOW,HIGH"
    else:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        kind = (inner[0] if inner else hint) | None
    positional = COMMAND_TABLE[command].positional
    if field.name in positional:
        option: Any = typer.Argument(help=help_text, metavar=positional[field.name])
    else:
        option = typer.Option(*flags, help=help_text, metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option],
    )


def _command(name: str) -> Callable[..., None]:
    """The function typer calls for command `name`, with one parameter a setting."""
    cls = COMMANDS[name]
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if not field.metadata["hidden"]]
    parameters = [_parameter(name, f, hints[f.name]) for f in _own_first(fields)]
    file_option = typer.Option("--config", help="Settings file.  [default: repa.toml]")
    parameters.append(
        inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, file_option],
        )
    )

    def run(**flags: Any) -> None:
        resolved = _resolve(name, flags)
        from repa_pipeline.tables import resolve as find

        find(COMMAND_TABLE[name].action)(resolved.config)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = COMMAND_TABLE[name].summary
    return run


def _own_first(fields: list[dataclasses.Field[Any]]) -> list[dataclasses.Field[Any]]:
    """A command's own settings before those that all commands share."""
    common = {field.name for field in dataclasses.fields(CommonConfig)}
    own = [field for field in fields if field.name not in common]
    return own + [field for field in fields if field.name in common]


def _resolve(command: str, flags: dict[str, Any]) -> Resolved:
    project = load_project(flags.pop("config_file", None))
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    return resolve(command, given, project)


for _name in COMMANDS:
    app.command(_name)(_command(_name))


@app.command("config")
def show_config(
    command: Annotated[str | None, typer.Argument(help="Only this command's settings.")] = None,
    config_file: Annotated[
        str | None, typer.Option("--config", help="Settings file.  [default: repa.toml]")
    ] = None,
) -> None:
    """Print the resolved settings and where each came from."""
    from repa_pipeline.commands import print_config

    print_config(command, load_project(config_file))


@app.command("selftest")
def selftest(
    vectors: Annotated[str, typer.Option(help="Folder of reference vectors.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, tf32 or bf16.")] = "float32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be checked.")] = False,
) -> None:
    """Check this installation against reference vectors; exit 1 above the tolerance."""
    from repa_pipeline.commands import run_selftest_command

    raise typer.Exit(run_selftest_command(vectors, device, dtype, dry_run))


@app.command("demo")
def demo(
    workspace: Annotated[str, typer.Option(help="Folder for everything.")] = "./repa-demo",
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the commands only.")] = False,
) -> None:
    """Run the whole chain on the embedded digits: REPA and its vanilla twin, scored, one page."""
    from repa_pipeline.demo import run_demo

    run_demo(workspace, seed, dry_run)


def _fail(message: str, code: int) -> NoReturn:
    print(f"repa: {message}", file=sys.stderr)
    raise SystemExit(code)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's error is one line and exit code 2; a bug keeps its traceback."""
    command = typer.main.get_command(app)
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = command.main(arguments, prog_name="repa", standalone_mode=False)
    except RepaError as error:
        _fail(str(error), EXIT_USER_ERROR)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        # click's own errors (an unknown flag, a wrong type), whichever click typer brought.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(f"{error.format_message()} (see `repa --help`)", EXIT_USER_ERROR)
        if type(error).__name__ == "Abort":
            code = EXIT_INTERRUPTED
        else:
            raise
    if code == EXIT_INTERRUPTED:  # typer turns KeyboardInterrupt into this code
        _fail("interrupted; what was finished is kept, run the same command to go on", code)
    raise SystemExit(code if isinstance(code, int) else 0)
