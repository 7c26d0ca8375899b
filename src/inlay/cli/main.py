"""The entry point of the command: run a verb, and report every error in one sentence."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from inlay.errors import InlayError, UsageError, did_you_mean

VERBS = {
    "demo": "a whole run, offline, in a few minutes: tune, compare, merge, report",
    "plan": "the memory and time of a run before it starts, and what fits",
    "train": "tune an adapter on a data file and measure it",
    "eval": "compare base and tuned on the same rows",
    "merge": "merge an adapter into its base, check the result, save a plain model folder",
    "generate": "complete a prompt or the rows of a file",
    "data": "show the data as training sees it: counts, lengths, masks",
    "methods": "list the fine-tuning methods, or show one",
}
"""Every verb with what it does; the file of the same name in this folder runs it."""

CACHED_PRODUCTS = "96"
"""Compiled half-precision products, one per shape, that PyTorch caches on a CPU. Its default is a
thousand of 0.7 MB each, and every new batch length adds some; a step needs some dozens."""

FINE, BUG, WRONG, BROKEN_PIPE, INTERRUPTED = 0, 1, 2, 141, 130
"""Exit codes: success, a bug in Inlay, an error of the user's, and the shell's own two."""

OUT_OF_MEMORY = (
    "out of memory; lower --batch-size or --max-length, raise --gradient-accumulation to keep "
    "the same step, or store the base in fewer bits with --storage nf4"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 wrong input, 130 interrupted, 1 a bug."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with quiet_libraries():
        return exit_code(words, debug)


def exit_code(words: list[str], debug: bool) -> int:
    try:
        code = dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C; files that were saved before remain")
        return INTERRUPTED
    except UsageError as error:
        complain(f"{finished(str(error))} See `{help_for(words)}`.")
        return WRONG
    except InlayError as error:
        complain(str(error))
        return WRONG
    except OSError as error:
        complain(sentence_for(error))
        return WRONG
    except MemoryError:
        complain(OUT_OF_MEMORY)
        return WRONG
    except Exception as error:
        if is_out_of_gpu_memory(error):
            complain(OUT_OF_MEMORY)
            return WRONG
        return report_bug(error, words, debug)


def dispatch(words: Sequence[str]) -> int:
    verb, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if verb in ("--help", "-h", "help"):
        print(overview())
        return FINE
    if verb == "--version":
        print(f"inlay {importlib.metadata.version('inlay')}")
        return FINE
    if verb not in VERBS:
        what = "flag" if verb.startswith("-") else "verb"
        hint = did_you_mean(verb, VERBS)
        raise UsageError(f"there is no {what} {verb!r}; the verbs are {', '.join(VERBS)}.{hint}")
    module = importlib.import_module(f"inlay.cli.{verb}")
    parser = module.parser(rest)
    if "--help" in rest or "-h" in rest:
        print(parser.format_help(), end="")
        return FINE
    return module.run(parser.given(rest))


def overview() -> str:
    verbs = "\n".join(f"  {verb:<10}{about}" for verb, about in VERBS.items())
    return (
        "usage: inlay VERB [flags]\n\n"
        "Fine-tune a model with a small adapter, measure it, and merge it.\n\n"
        f"verbs:\n{verbs}\n\n"
        "start here:\n"
        "  inlay demo\n"
        "  inlay train --model Qwen/Qwen3-0.6B --data my.jsonl --output run\n"
        "  inlay train run.yaml --rank 32\n\n"
        "`inlay VERB --help` lists a verb's flags; `inlay --version` says which version this is;\n"
        "`--debug` shows the traceback of an unexpected error."
    )


def help_for(words: Sequence[str]) -> str:
    return f"inlay {words[0]} --help" if words and words[0] in VERBS else "inlay --help"


def finished(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."


def complain(text: str) -> None:
    for line in text.splitlines():
        print(f"inlay: {line}", file=sys.stderr)


def sentence_for(error: OSError) -> str:
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    where = f": {error.filename}" if error.filename else ""
    advice = "; free some space and run the same command again" if "space" in reason else ""
    return f"{reason}{where}{advice}"


def report_bug(error: Exception, words: Sequence[str], debug: bool) -> int:
    trace = "".join(traceback.format_exception(error))
    if debug:
        print(trace, file=sys.stderr, end="")
        place = ""
    else:
        with tempfile.NamedTemporaryFile(
            "w", prefix="inlay-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"inlay {' '.join(words)}\n{trace}")
        place = f" The details are in {file.name}."
    first = (str(error).splitlines() or [""])[0]
    complain(f"this is a bug in Inlay: {type(error).__name__}: {first}.{place}")
    return BUG


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Recognise torch's out-of-memory error without importing torch."""
    return type(error).__name__ == "OutOfMemoryError"


ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": CACHED_PRODUCTS,
    "LRU_CACHE_CAPACITY": CACHED_PRODUCTS,
}
"""What the libraries are told, unless the user has set it."""


@contextmanager
def quiet_libraries() -> Generator[None]:
    own = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    logger, shown = logging.getLogger("bitsandbytes"), warnings.showwarning
    level, torch, output = logger.level, sys.modules.get("torch"), sys.stdout
    threads = None if torch is None else torch.get_num_threads()
    os.environ.update(own)
    logger.setLevel(logging.CRITICAL)
    warnings.showwarning = show_warning
    errors = output.errors if isinstance(output, io.TextIOWrapper) else None
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        logger.setLevel(level)
        warnings.showwarning = shown
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors=errors)
        if torch is not None:
            torch.set_num_threads(threads)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object
) -> None:
    del filename, lineno, rest
    first = (str(message).splitlines() or [""])[0]
    print(f"inlay: {category.__name__}: {first}", file=sys.stderr)
