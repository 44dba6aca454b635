"""What a cell asks in the middle of a call: the caller's own code runs here, never in the cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from crumplezone.sandbox.ipc.channel import ProtocolError, decoded
from crumplezone.workers.llama.calls.client import LlamaClient
from crumplezone.workers.llama.calls.task import Task
from crumplezone.workers.protocol.llama import Judge, Judged, Note, Nothing, Question, question_shapes

_question = msgspec.msgpack.Decoder(Question).decode


class Callbacks:
    """Answers questions: notes of what has happened, logits processors, stopping criteria.

    Attributes:
        running: One of the caller's is running.
    """

    running: bool = False

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The one that runs asks the cell itself."""
        self.running = False
        try:
            yield
        finally:
            self.running = True

    def answer(self, client: LlamaClient, task: Task, body: msgspec.Raw) -> msgspec.Struct:
        """Answer a question; what the caller's callbacks raise goes through.

        Raises:
            CellDied: It is no question that the cell may ask.
        """
        info, cell = client.info, client.running()
        try:
            question = decoded(_question, body)
        except ProtocolError as error:
            raise client.lie(f"asked what does not decode: {error}") from error
        note = question if isinstance(question, Note) else question.note
        if problem := task.take(note, info.cell.n_vocab, info.n_ctx):
            raise client.lie(problem)
        if task.too_curious(info.n_ctx):
            raise client.lie(f"asked {task.asked} questions")
        if isinstance(question, Note):
            return Nothing()
        if question.n_ids > info.n_ctx:
            raise client.lie(f"asked about {question.n_ids} tokens")
        shapes = question_shapes(info.cell.n_vocab, question.n_ids)
        logits, ids = (array.copy() for array in cell.arrays(shapes))
        self.running = True
        try:
            if isinstance(question, Judge):
                assert task.criteria is not None
                return Judged(bool(task.criteria(ids, logits)))
            for processor in task.processors or ():
                logits[:] = processor(ids, logits)
        finally:
            self.running = False
        answer, _ = cell.arrays(shapes)  # anew: a query may have used the arena meanwhile
        answer[:] = logits
        return Judged()
