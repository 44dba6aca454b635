"""``crumplezone``: the commands, and the only place where errors become exit codes.

Exit codes: 0 done; 1 done, and something failed (of `run`: some prompts, whose errors are in the output);
2 bad usage or bad input; 3 the model could not be loaded, or this machine refused something; 130 interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command

import crumplezone
from crumplezone.cli import output
from crumplezone.cli.ci import ci
from crumplezone.cli.exec import execute
from crumplezone.cli.output import AsJson
from crumplezone.cli.triage import verbs as triage
from crumplezone.errors import CrumplezoneError, InputError, ReportError
from crumplezone.reports.printable import printable

SOME_FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run llama.cpp where its crashes cannot reach you, and look at the ones that happened.",
    epilog="Exit codes: 0 done; 1 done, and something failed (of `run`: some prompts); 2 bad usage or input; "
    "3 the model did not load or the machine refused; 130 interrupted.",
)
app.add_typer(triage.app, name="triage")
app.command()(ci)
app.command("exec", context_settings={"allow_interspersed_args": False})(execute)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crumplezone {crumplezone.__version__}")
        raise typer.Exit


@app.callback()
def _begin(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    _quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=output.be_quiet,
            help="Only results and errors: no progress, no hints.",
        ),
    ] = False,
) -> None:
    # Inherited as ignored, it would let nobody know how a cell has ended. `exec` does this itself: its
    # program is to inherit what was.
    if context.invoked_subcommand != "exec" and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


ModelOption = Annotated[
    Path | None, typer.Option("--model", help="GGUF file. Default: the embedded SmolLM2.", show_default=False)
]
ReportsOption = Annotated[
    Path | None,
    typer.Option(
        "--reports",
        help="Crash report store. Default: $CRUMPLEZONE_REPORTS, or $XDG_STATE_HOME/crumplezone/reports.",
        show_default=False,
    ),
]


@app.command()
def run(
    prompts: Annotated[
        str,
        typer.Option(
            help='.jsonl (a "prompt" in each line), .txt (a prompt a line), or - for text on stdin.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON lines, one per prompt, appended as they finish.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add to each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For temperatures above 0: of the first prompt, the next has the next number. "
            "Default: another for each prompt, at each run.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Each answer ends before this text; may be given several times.", show_default=False
        ),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Take special tokens that are written out in prompts for these.")
    ] = False,
    n_seq_max: Annotated[
        int, typer.Option(min=0, max=256, help="Prompts decoded together; 0: what is fastest, measured once.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Cells that share the prompts.")] = 1,
    n_ctx: Annotated[int, typer.Option(min=0, help="Context over all sequences; 0: 1024 for each.")] = 0,
    reports: ReportsOption = None,
) -> None:
    """Complete prompts from a file. Run it again after any interruption: it goes on where it stopped."""
    from crumplezone.cli.run import Job, complete
    from crumplezone.workers.generate.requests.request import Request, RequestOptions

    options = RequestOptions(
        max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or [], special=special
    )
    Request("-", **options)  # what is wrong with them is said before a model is loaded
    job = Job(prompts, out, model, options, n_seq_max, workers, n_ctx, reports)
    raise typer.Exit(SOME_FAILED if complete(job) else 0)


@app.command()
def demo(model: ModelOption = None, reports: ReportsOption = None) -> None:
    """Eight prompts in one native batch, then a real segmentation fault, survived and explained."""
    from crumplezone.cli.demo import show

    show(model, reports)


@app.command()
def doctor(model: ModelOption = None, reports: ReportsOption = None, as_json: AsJson = False) -> None:
    """Say what this machine allows and what each lack costs. Exit code 1: something needed is lacking."""
    from crumplezone.cli.doctor import show

    raise typer.Exit(SOME_FAILED if show(model, reports, as_json=as_json) else 0)


def _command_line() -> TyperGroup:
    """All commands, each with the option --quiet of the first one: it is looked for in both places."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    (quiet,) = [option for option in root.params if "--quiet" in option.opts]
    quiet.expose_value = False
    groups = [root]
    for group in groups:
        for command in group.commands.values():
            command.params.append(quiet)
            if isinstance(command, TyperGroup):
                groups.append(command)
    return root


class _Printable(logging.Formatter):
    """Records from a cell are untrusted: no escape codes to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main() -> None:
    """Entry point: every expected failure is one message on stderr and an exit code."""
    logging.getLogger("llama.cpp").setLevel(logging.CRITICAL)  # its errors are part of ours
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        _command_line()(prog_name="crumplezone")
    except (InputError, ReportError) as error:
        stderr.print(f"crumplezone: {printable(str(error))}", markup=False, style="bold red")
        sys.exit(USAGE)
    except (CrumplezoneError, OSError) as error:
        stderr.print(f"crumplezone: {printable(str(error))}", markup=False, style="bold red")
        sys.exit(ENVIRONMENT)
    except KeyboardInterrupt:
        stderr.print("crumplezone: interrupted; run the same command again to go on.", markup=False)
        sys.exit(INTERRUPTED)
