"""The ``jaxcomp`` command: what a file of weights holds, how two differ, a report, a smaller file, other runtimes'.

Exit codes: 0; 1 where ``diff`` found a difference, or ``export`` that the runtime computes something else; 2 with an
error, which is one line; 130 stopped from the keyboard.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

DESCRIPTION = """Look at networks, compress them, and export them.

Files are those of jaxcomp.save, safetensors of other programs, .npz, .npy, and .msgpack of Flax. A command says what it
takes with --help."""

Out = Annotated[Path, arg(metavar="FILE")]
Name = Annotated[str, arg(metavar="NAME")]
File = Annotated[Positional[Path], arg(metavar="FILE")]
Before = Annotated[Positional[Path], arg(metavar="BEFORE")]
After = Annotated[Positional[Path], arg(metavar="AFTER")]
Form = Literal["table", "json"]
Format = Literal["onnx", "stablehlo", "litert", "compressed-tensors", "gguf"]


def inspect(file: File, /, *, form: Form = "table") -> int:
    """Show what a file holds: of each leaf its method, bits a weight and at its entropy, zeros and bytes.

    Args:
      file: of weights, or a folder of the compressed-tensors layout.
      form: how it is printed.
    """
    from jaxcomp.report.files import as_stored
    from jaxcomp.report.inputs import read

    held = read(file)
    found = as_stored(held)
    if form == "json":
        rows = [{**asdict(row), "bits": row.bits} for row in found.rows]
        print(json.dumps({"kind": held.kind, "bytes": held.bytes, "metadata": held.metadata, "leaves": rows}, indent=1))
        return 0
    print(f"{file}: {held.kind}, {held.bytes:,} bytes.")
    for name, value in held.metadata.items():
        print(f"{name}: {value!s:.100}")
    print(found)
    return 0


def diff(before: Before, after: After, /, *, form: Form = "table") -> int:
    """Show which leaves differ in method, shape, type or values; exit code 1 where any does.

    Args:
      before: one file.
      after: the other one.
      form: how it is printed.
    """
    from jaxcomp.core.tables import columns
    from jaxcomp.report.compare import changes
    from jaxcomp.report.inputs import read
    from jaxcomp.report.markdown import LAYER_HEAD, layer_row
    from jaxcomp.report.plain import layer_of

    one, other = read(before), read(after)
    found = [c for c in changes(one.tree, other.tree) if not c.alike]
    if form == "json":
        sizes = {"before": one.bytes, "after": other.bytes}
        print(json.dumps({"bytes": sizes, "layers": [layer_of(c) for c in found]}, indent=1, allow_nan=False))
    else:
        if found:
            print(columns([LAYER_HEAD, *map(layer_row, found)], "llllrrrrr"))
        some = "1 leaf differs" if len(found) == 1 else f"{len(found)} leaves differ"
        print(f"{some}; {one.bytes:,} and {other.bytes:,} bytes." if found else "No leaf differs.")
    return 1 if found else 0


def report(
    before: Before,
    after: After,
    /,
    *,
    out: Out = Path("report.html"),
    others: Annotated[tuple[Path, ...], arg(metavar="FILE")] = (),
    score: Name = "accuracy",
    scores: Annotated[tuple[float, ...], arg(metavar="NUMBER")] = (),
    lower: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    title: Annotated[str, arg(metavar="TEXT")] = "",
    pictures: int = 12,
) -> int:
    """Write a page that compares two files: bytes, bits, zeros, errors, histograms with the grid's lines, masks.

    Args:
      before: the network as it was.
      after: the network as it is.
      out: the page; .html, .md or .json says which kind.
      others: more files, for the frontier of bytes and score.
      score: what the score is called. Files that have a number of this name in their metadata need no --scores.
      scores: of before, after and the others, in this order.
      lower: whether a lower score is better.
      title: of the page.
      pictures: of how many leaves there are pictures.
    """
    from jaxcomp.report.files import points_of
    from jaxcomp.report.inputs import read
    from jaxcomp.report.page import check_output
    from jaxcomp.report.page import report as reported

    check_output(out)  # before the work, not after it
    one, other = read(before), read(after)
    held = [(before, one), (after, other), *((path, read(path)) for path in others)]
    points = points_of(held, score, scores)
    if others and not points:
        raise ValueError(
            f"report: --others are drawn by their score; give --scores, {len(held)} numbers, or save the files with"
            f" metadata={{{score!r}: ...}}."
        )
    done = reported(
        one.tree,
        other.tree,
        title=title or f"{before.name} and {after.name}",
        points=points,
        score=score,
        higher=not lower,
        sizes=(one.bytes, other.bytes),
        pictures=pictures,
    )
    done.save(out)
    print(f"{out}: {one.bytes:,} bytes became {other.bytes:,}, {one.bytes / other.bytes:.1f} times fewer.")
    return 0


def export(
    file: File,
    /,
    *,
    to: Format,
    out: Out | None = None,
    fn: Annotated[str, arg(metavar="MODULE:FUNCTION")] = "",
    shape: Annotated[tuple[str, ...], arg(metavar="SHAPE")] = (),
    samples: Annotated[tuple[Path, ...], arg(metavar="FILE")] = (),
) -> int:
    """Write a file for another runtime; a program is run there and compared with JAX.

    ONNX, StableHLO and LiteRT hold a program: name its function, of the parameters and the arguments, and the shape of
    each argument. compressed-tensors and GGUF hold weights; where paths do not say what products do with the axes, name
    the function too.

    Args:
      file: of weights.
      to: what.
      out: the new file; beside the old one by default.
      fn: the function; its module is imported, the current directory first, and so is run.
      shape: of each argument, such as batch,28,28,1 or batch,128:int32; a name is a dimension of any size.
      samples: .npy files, one for each argument: round activations to 8 bits, with the ranges that these have.
    """
    from jaxcomp.export import command
    from jaxcomp.report.inputs import read

    target = out or command.output_of(file, to)
    if to == "compressed-tensors" or to == "gguf":
        if samples or bool(fn) != bool(shape):
            raise ValueError(
                f"export: {to} holds weights alone; leave --samples out, and give --fn and --shape both, which say what"
                " products do with the axes, or neither."
            )
        done = command.export_weights(read(file).tree, to, target, fn=fn, shapes=shape)
    elif not fn or not shape:
        raise ValueError(f"export: {to} holds a program; say --fn MODULE:FUNCTION and a --shape for each argument.")
    else:
        done = command.export_program(read(file).tree, to, target, fn=fn, shapes=shape, samples=samples)
    print(f"{done.path}: {done.bytes:,} bytes, of {os.path.getsize(file):,}.")
    if done.apart is None:
        return 0
    print("Run beside JAX: largest difference {:.2g} of the largest number, cosine {:.6f}.".format(*done.apart))
    return 0 if done.apart[1] >= 0.99 else 1


def compress(
    file: File,
    /,
    *,
    fn: Annotated[str, arg(metavar="MODULE:FUNCTION")],
    samples: Annotated[tuple[Path, ...], arg(metavar="FILE")],
    ratio: float = 8.0,
    macs: float | None = None,
    out: Out | None = None,
    measure: Literal["noise", "kl"] = "noise",
    coding: Literal["ans", "zstd", "none"] = "none",
    keep: Annotated[str, arg(metavar="RULE")] = "",
) -> int:
    """Make a file as many times smaller as asked for with the least harm, and write the plan and a report beside it.

    What each leaf may become is measured on samples, without labels, and chosen exactly. The same command goes on where
    it was stopped; a choice that is edited in plan.json is taken.

    Args:
      file: of weights.
      fn: the function; its module is imported, the current directory first, and so is run.
      samples: .npy files, one for each argument behind the parameters, of examples along the first axis.
      ratio: how many times smaller.
      macs: how many times fewer multiply-accumulates, by channels that go.
      out: the folder; beside the file by default.
      measure: of the outputs' distance; kl for logits.
      coding: of the file; ans is the smallest.
      keep: a rule of paths that stay as they are.
    """
    from jaxcomp.report.inputs import read
    from jaxcomp.search.command import compress_file

    target = out or file.with_name(f"{file.stem}_compressed")
    done = compress_file(
        read(file).tree,
        fn,
        samples,
        out=target,
        ratio=ratio,
        macs=macs,
        measure=measure,
        coding=coding,
        keep=keep,
    )
    print(done.plan)
    print(done)
    print(f"{target}: compressed.safetensors, plan.json, report.md, measured.json.")
    return 0


def completion(shell: Annotated[Positional[Literal["bash", "zsh", "tcsh"]], arg(metavar="SHELL")], /) -> int:
    """Print what makes a shell complete this command's words.

    In bash: source <(jaxcomp completion bash). In zsh: jaxcomp completion zsh > a folder of $fpath, as _jaxcomp.

    Args:
      shell: bash, zsh or tcsh.
    """
    with contextlib.suppress(SystemExit):
        _run(["--tyro-print-completion", shell])
    return 0


def command() -> None:
    """The console script: :func:`main` on the CPU, for a look at a file wants no accelerator, nor all its memory."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    sys.exit(main())


COMMANDS: dict[str, Callable[..., int]] = {
    "inspect": inspect,
    "diff": diff,
    "report": report,
    "compress": compress,
    "export": export,
    "completion": completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    from jaxcomp.artifact.disk import FileError

    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (FileError, ValueError, TypeError, ImportError, OSError) as e:
        if isinstance(e, BrokenPipeError):  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return code


def _run(arguments: Sequence[str]) -> int:
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="jaxcomp", description=DESCRIPTION, args=list(arguments))


if __name__ == "__main__":
    command()
