"""The prompts of requests as tokens, by the cell of a lane."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellDied
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.generate.requests.jobs import PromptJob
from crumplezone.workers.generate.requests.request import check_room
from crumplezone.workers.incidents.deaths import retried
from crumplezone.workers.incidents.reporter import Reporter


class PromptReader:
    """Makes tokens of prompts.

    Args:
        client: The cell that does it.
        reporter: Where its crashes go.
    """

    def __init__(self, client: DecodeClient, reporter: Reporter) -> None:
        self._client, self._reporter = client, reporter

    def read(self, job: PromptJob) -> tuple[npt.NDArray[np.int32], int]:
        """The tokens of a prompt, int32, and how many may follow.

        Raises:
            InputError: They do not fit into the context.
            CellDied: The tokenizer crashed.
        """

        def tell(died: CellDied, again: bool) -> None:
            if again:  # else whoever has asked tells of it
                self.report(job, died, "the tokenizer was asked again in a new cell")

        # The first death is perhaps of something older than this prompt.
        tokens, echo = retried(lambda: self._read(job), tell, own=1)
        info = self._client.info
        job.sampling.check_vocabulary(info.n_vocab)
        check_room(f"number of tokens of prompt {job.index}", len(tokens), info)
        job.made.begin(len(tokens), echo)
        return tokens, info.n_ctx_seq - len(tokens)

    def report(self, job: PromptJob, died: CellDied, result: str) -> str:
        """File a crash of the tokenizer; the path of the report."""
        client = self._client
        return self._reporter.file_lone(
            Incident.of(died), "tokenize", result, client.config, client.known, [job.index]
        )

    def _read(self, job: PromptJob) -> tuple[npt.NDArray[np.int32], str]:
        """Tokens, and the text that is to be echoed."""
        request = job.request
        if isinstance(request.prompt, str):
            parts: list[str | list[int]] = [request.prompt]
        else:
            parts = _runs(request.prompt)
        arrays: list[npt.NDArray[np.int32]] = []
        texts: list[str] = []
        for part in parts:
            if isinstance(part, str):
                arrays.append(self._client.tokenize(part, special=request.special, begin=not arrays))
                texts.append(part)
            else:
                arrays.append(np.array(part, np.int32))
                texts += self._client.detokenize([part]) if request.echo else []
        return np.concatenate(arrays), "".join(texts) if request.echo else ""


def _runs(prompt: tuple[int | str, ...]) -> list[str | list[int]]:
    """Texts, and what token ids lie between them."""
    runs: list[str | list[int]] = []
    for part in prompt:
        if isinstance(part, str):
            runs += [part] if part else []
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs
