"""Has a model judge many answers at once, each only if it was not judged before. Knows no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm

from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidOption
from lapwing_training.files import digest
from lapwing_training.labels.judge import TEMPLATE, Verdict, compares, fill, read_verdict, require_template
from lapwing_training.labels.judge_cache import JudgeCache, answer_key
from lapwing_training.labels.judge_endpoint import PARAMETERS, Endpoint, JudgeFailed, Rejected
from lapwing_training.progress import Advance

PATIENCE = 10
"""So many rejections, and nothing but rejections, mean that the endpoint takes none of our requests."""


@dataclass(frozen=True)
class Usage:
    """What a run asked for; tokens are those of its own requests."""

    requests: int = 0
    """Answered or rejected; retries are not counted."""

    cached: int = 0
    """Items that were judged before, or as another item of the same text."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def price(self, price_in: float, price_out: float) -> float:
        """In the currency of the two prices, which are per million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


class Judge:
    """A model, the prompt that it gets, and what it said so far."""

    def __init__(self, endpoint: Endpoint, cache: JudgeCache, template: str = TEMPLATE, concurrency: int = 8) -> None:
        """Asks nothing yet.

        Args:
            template: with {question}, {response} and, unless the judge is to know by itself, {references}.
            concurrency: requests under way at once.

        Raises:
            InvalidOption: a prompt without those places, or no request at once.
        """
        require_template(template)
        if concurrency < 1:
            raise InvalidOption(f"concurrency is {concurrency}; expected at least 1 request at once")
        self.usage = Usage()
        self._endpoint, self._cache = endpoint, cache
        self._template, self._concurrency = template, concurrency

    @property
    def name(self) -> str:
        """Of the model."""
        return self._endpoint.options.model

    @property
    def prompt_digest(self) -> str:
        """Of the prompt before anything is filled in."""
        return digest(self._template.encode())[:12]

    @property
    def compares(self) -> bool:
        """Whether the judge is shown the accepted answers."""
        return compares(self._template)

    def __call__(self, items: Sequence[LabelledGeneration]) -> list[Verdict]:
        """A verdict for each item, in their order; what was asked is counted in `usage`.

        Raises:
            InvalidOption: there is no key where one is needed.
            JudgeFailed: the endpoint can't be asked; what it answered so far is kept.
        """
        prompts = [fill(self._template, item) for item in items]
        address = self._endpoint.address
        keys = [answer_key(self.name, prompt, PARAMETERS, address) for prompt in prompts]
        open_ = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._cache}
        fresh = all(key in open_ for key in keys)
        try:
            rejected = self._ask_all(open_, fresh)
        except JudgeFailed as error:
            kept = sum(key in self._cache for key in set(keys))
            raise JudgeFailed(
                f"{error} ({kept} of {len(set(keys))} answers are kept in {self._cache.path}; the same command goes on)"
            ) from None
        self.usage = self._used(open_, len(items))
        return [rejected[key] if key in rejected else read_verdict(self._cache[key]) for key in keys]

    def _ask_all(self, open_: Mapping[str, str], fresh: bool) -> dict[str, Verdict]:
        """Fills the cache; returns what the endpoint rejected."""
        rejected: dict[str, Verdict] = {}
        asked = 0
        with tqdm(total=len(open_), desc="judge", unit="answer", disable=not open_) as progress:
            # One at a time until one is answered: that settles which form of request the endpoint takes.
            for asked, (key, prompt) in enumerate(open_.items(), 1):
                self._ask(key, prompt, rejected)
                progress.update()
                if len(rejected) < asked:
                    break
                if fresh and asked == min(PATIENCE, len(open_)):
                    raise JudgeFailed(f"{rejected[key].reason}, and so it did with all {asked} so far; check --judge")
            self._ask_rest(list(open_.items())[asked:], rejected, progress.update)
        return rejected

    def _ask_rest(self, remaining: Sequence[tuple[str, str]], rejected: dict[str, Verdict], advance: Advance) -> None:
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = [pool.submit(self._ask, key, prompt, rejected) for key, prompt in remaining]
            try:
                for future in as_completed(asked):
                    future.result()
                    advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is under way is paid for: it is waited for
                raise

    def _ask(self, key: str, prompt: str, rejected: dict[str, Verdict]) -> None:
        try:
            self._cache.add(key, self.name, self._endpoint.ask(prompt))
        except Rejected as error:
            rejected[key] = Verdict("rejected", str(error))

    def _used(self, open_: Mapping[str, str], items: int) -> Usage:
        answers = [self._cache[key] for key in open_ if key in self._cache]
        return Usage(
            requests=len(open_),
            cached=items - len(open_),
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
        )
