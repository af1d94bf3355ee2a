"""`infer evaluate-text`: bits per byte of text files by a Hugging Face directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.manifest import Inputs
from shared.checkpoint.directory.publish import publish
from shared.cli import log
from shared.data.text_options import TextOptions
from shared.data.text_windows import Window, checked_window, prefix_token, read_documents, windows_of
from shared.data.tokenizer import open_tokenizer
from shared.precision import DTYPES
from shared.report.text_scores import RESULTS, log_likelihoods, metrics_of, text_report, write_text_report
from tools.infer.engines.checkpoint_precision import chosen_precision
from tools.infer.engines.engine import EngineSettings, open_engine
from tools.infer.environment import prepare_environment
from tools.infer.source import open_hf_directory


def run(source: Path, options: TextOptions, *, settings: EngineSettings) -> None:
    """Measure and publish. UserError for a text or a window that does not fit."""
    prepare_environment()
    inputs: Inputs = {"source": source, "text": options.text}
    with publish(options.target, kind="result", inputs=inputs, overwrite=options.overwrite) as out:
        model = open_hf_directory(source)
        with closing(open_engine(model, settings)) as engine:
            size, step = checked_window(options.window, options.stride, engine.context_length)
            tokenizer = open_tokenizer(model, flag="--source", needs_eos=False)
            documents = read_documents(options.text, options.text_key, tokenizer)
            windows = list(windows_of(documents, prefix_token(tokenizer), size, step))
            lm = engine.harness_model()
            began = time.monotonic()
            values = window_likelihoods(lm, windows)
            seconds = time.monotonic() - began
        likelihoods = log_likelihoods(documents, [each.document for each in windows], values)
        report = text_report(
            documents,
            likelihoods,
            engine=engine.name,
            model_arguments={"source": str(source), "dtype": DTYPES[chosen_precision(model, settings.precision)]},
            window=size,
            stride=step,
            seconds=seconds,
        )
        write_text_report(out.path, report, documents, likelihoods, model=source.resolve().name)
        metrics = metrics_of(report)
        out.describe(engine=engine.name, metrics=metrics, seconds=round(seconds, 2))
    for file, of in metrics.items():
        print(f"{file}  {of['bits_per_byte']:.6f} bits per byte")
    log(f"measured in {seconds:.1f} s: {options.target / RESULTS}")


def window_likelihoods(lm: Any, windows: Sequence[Window]) -> list[float]:
    """The log-likelihood of each window's targets, in nats, by a model class of the harness."""
    requests = []
    for window in windows:
        context = window.inputs[: len(window.inputs) - len(window.targets) + 1]
        requests.append((None, context, window.targets))
    return [float(value) for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
