"""One choice of one request: engine outputs in, text deltas out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dynamo_core.preprocess.detokenizer import Detokenizer, detokenizer
from dynamo_core.preprocess.stops import StopScanner
from dynamo_core.preprocess.vocabulary import Vocabulary
from dynamo_core.types import Delta, FinishReason, LogprobText, Output, TextOptions, TokenLogprob


class TextAssembler:
    """Joins detokenizer, stop strings and logprobs.

    The token that ends a choice (an end-of-sequence token, or the stop token that `stop_reason` names) counts, so it stays in
    `token_ids`, but it is not part of the text, unless `include_stop` asks for it.

    A delta is made as soon as there is text; tokens without text yet wait for it, and for the end at the latest.
    """

    __slots__ = ("_detokenizer", "_done", "_entries", "_eos", "_ids", "_include_stop", "_logprobs", "_scanner", "_vocabulary", "index", "stopped")

    def __init__(self, vocabulary: Vocabulary, options: TextOptions, *, eos_token_ids: Collection[int] = (), index: int = 0,
                 prompt_tail: Sequence[int] = ()) -> None:
        self.index = index
        self.stopped = False
        self._done = False
        self._vocabulary = vocabulary
        self._eos = eos_token_ids
        self._include_stop = options.include_stop
        self._logprobs = options.logprobs
        self._detokenizer: Detokenizer = detokenizer(vocabulary, skip_special_tokens=options.skip_special_tokens, prompt_tail=prompt_tail)
        self._scanner = StopScanner(options.stop, include=options.include_stop) if options.stop else None
        self._ids: list[int] = []
        self._entries: list[LogprobText] = []

    def push(self, output: Output, into: Delta | None = None) -> Delta | None:
        """What this output adds, merged into `into` when that is given (then the result is `into` itself).

        `None`: nothing to say yet. Everything after a stop string or a finish reason is ignored.
        """
        if self._scanner is None and not self._logprobs and output.finish_reason is None and not self._done:
            text = self._detokenizer.push(output.token_ids)
            if text and into is None and not self._ids:
                return Delta(self.index, text, output.token_ids[:])
            return self._emit(text, output.token_ids, into)
        return into if self._done else self._push(output, into)

    def _push(self, output: Output, into: Delta | None) -> Delta | None:
        ids, reason, stop_reason = output.token_ids, output.finish_reason, output.stop_reason
        shown = ids[:-1] if self._hides_last(output) else ids
        text, stop = "", None
        if self._scanner is None:
            text = self._detokenizer.push(shown)
        else:  # one by one, to know which token completed the stop string
            for used, token_id in enumerate(shown, 1):
                more, stop = self._scanner.push(self._detokenizer.push((token_id,)))
                text += more
                if stop is not None:
                    ids = ids[:used]
                    break
        if reason is not None and stop is None:
            rest = self._detokenizer.flush()
            if self._scanner is not None:
                rest, stop = self._scanner.push(rest)
                rest += self._scanner.flush()
            text += rest
        if stop is not None:
            self.stopped, reason, stop_reason = True, "stop", stop
        self._done = reason is not None
        if self._logprobs and output.logprobs:
            self._entries += [self._render(entry) for entry in output.logprobs[: len(ids)]]
        return self._emit(text, ids, into, reason, stop_reason)

    def _hides_last(self, output: Output) -> bool:
        if output.finish_reason != "stop" or self._include_stop or not output.token_ids:
            return False
        last = output.token_ids[-1]
        return last == output.stop_reason if output.stop_reason is not None else last in self._eos

    def _emit(self, text: str, token_ids: list[int], into: Delta | None, reason: FinishReason | None = None,
              stop_reason: int | str | None = None) -> Delta | None:
        self._ids += token_ids
        if into is None:
            if not text and reason is None:
                return None
            into = Delta(self.index)
        into.text += text
        into.token_ids += self._ids
        self._ids = []
        if self._logprobs:
            into.logprobs = (into.logprobs or []) + self._entries
            self._entries = []
        if reason is not None:
            into.finish_reason, into.stop_reason = reason, stop_reason
        return into

    def _render(self, entry: TokenLogprob) -> LogprobText:
        return logprob_text(self._vocabulary, entry.token_id, entry.logprob, entry.top)


def logprob_text(vocabulary: Vocabulary, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> LogprobText:
    """One position, and its alternatives, as clients see them."""
    token, data = vocabulary.piece(token_id)
    return LogprobText(token, token_id, logprob, data, [logprob_text(vocabulary, other, value) for other, value in top])
